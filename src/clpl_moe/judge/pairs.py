"""The passages of training files that are to be judged, by query, and the lines again after the verdicts."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from clpl_moe.common.text_key import text_key
from clpl_moe.data.formats import DataFile
from clpl_moe.data.schema import negative_queries, training_lines
from clpl_moe.judge.answers import Verdict
from clpl_moe.judge.options import JudgeArguments
from clpl_moe.judge.scores import Scores


class Pair(NamedTuple):
    """A query and a passage, each by :func:`key_of`."""

    query: str
    passage: str


@dataclass
class Passage:
    """A passage that is judged for a query."""

    text: str  # as it first occurs
    ids: list[str] = field(default_factory=list)  # all that the files give it
    was: set[str] = field(default_factory=set)  # "pos", "neg": in which lists it is to be judged


@dataclass
class Query:
    """A query with the passages that are judged for it, and its known positives, by their keys."""

    text: str
    passages: dict[str, Passage] = field(default_factory=dict)
    positives: set[str] = field(default_factory=set)


def key_of(text: str) -> str:
    """The same for texts that count as equal."""
    return hashlib.sha256(text_key(text).encode()).hexdigest()[:32]


def read_queries(
    files: Sequence[DataFile], arguments: JudgeArguments, scores: Scores | None
) -> tuple[dict[str, Query], Counter[str]]:
    """The queries with the passages to judge, by key, and counts for the plan.

    A negative that is a known positive of its query, in any line, is not judged. Without ``scores`` all others are.
    """
    queries: dict[str, Query] = {}
    counts: Counter[str] = Counter()
    limits = None if scores is None or arguments.share is None else _limits_of_share(files, arguments.share, scores)
    for place, record in training_lines(files):
        query = queries.setdefault(key_of(record["query"]), Query(record["query"]))
        query.positives.update(map(key_of, record["pos"]))
        lists: dict[str, list[str]] = {"neg": record.get("neg") or []}
        if arguments.positives:
            lists["pos"] = record["pos"]
        doubtful: dict[str, Sequence[int]] = {name: range(len(texts)) for name, texts in lists.items()}
        if scores is not None and lists["neg"]:
            of_positives, of_negatives = scores(place, record)
            least, most = limits or (min(of_positives) - arguments.margin, max(of_negatives) + arguments.margin)
            doubtful["neg"] = [i for i, score in enumerate(of_negatives) if score >= least]
            doubtful["pos"] = [i for i, score in enumerate(of_positives) if score <= most]
        counts["lines"] += 1
        counts["negatives"] += len(lists["neg"])
        counts["doubtful negatives"] += len(doubtful["neg"])
        for name, texts in lists.items():
            ids = record.get(f"{name}_ids")
            for i in doubtful[name]:
                passage = query.passages.setdefault(key_of(texts[i]), Passage(texts[i]))
                passage.was.add(name)
                identifier = ids[i] if isinstance(ids, list) and i < len(ids) else None
                if isinstance(identifier, str) and identifier not in passage.ids:
                    passage.ids.append(identifier)
    for query in queries.values():
        for key in query.positives & query.passages.keys():
            if query.passages[key].was == {"neg"}:
                del query.passages[key]
    return queries, counts


def _limits_of_share(files: Sequence[DataFile], share: float, scores: Scores) -> tuple[float, float]:
    """The lowest score of the ``share`` of all negatives that score highest, and the highest of the positives that score lowest."""
    of_positives, of_negatives = array("d"), array("d")
    for place, record in training_lines(files):
        if record.get("neg"):
            for found, values in zip((of_positives, of_negatives), scores(place, record)):
                found.extend(values)
    negatives, positives = sorted(of_negatives, reverse=True), sorted(of_positives)
    number = [round(share * len(values)) for values in (negatives, positives)]
    return (
        negatives[number[0] - 1] if number[0] else math.inf,
        positives[number[1] - 1] if number[1] else -math.inf,
    )


def relabel(
    record: dict[str, Any],
    query: Query,
    verdicts: Mapping[str, Verdict],
    answering: str,
    counts: Counter[str],
) -> dict[str, Any]:
    """A line after the verdicts on passages, by key; ``counts`` gets what was done.

    Lists that belong to the passages (scores, ids, any ``pos_…`` and ``neg_…`` of the same length) go along. Where only
    the positives have such a list, a line that gets new positives loses it.
    """
    positives, negatives = (_lists(record, name) for name in ("pos", "neg"))
    there = [key_of(text) for text in record["pos"]]
    kept_positives = [i for i, key in enumerate(there) if not (key in verdicts and verdicts[key].answers == "no")]
    counts["positives dropped: do not answer"] += len(there) - len(kept_positives)
    there = [there[i] for i in kept_positives]
    kept, moved = [], []
    for i, text in enumerate(record.get("neg") or ()):
        key = key_of(text)
        verdict = verdicts.get(key)
        if verdict is None:
            if key in query.positives:
                counts["negatives dropped: known positives"] += 1
            else:
                kept.append(i)
        elif verdict.answers == "no":
            kept.append(i)
        elif verdict.answers == "partly":
            counts["negatives dropped: answer in part"] += 1
        elif answering == "drop" or key in there:
            counts["negatives dropped: answer"] += 1
        else:
            counts["negatives made positives"] += 1
            moved.append(i)
            there.append(key)
    changed = dict(record)
    for name, values in negatives.items():
        changed[name] = [values[i] for i in kept]
    for name, values in positives.items():
        other = negatives.get(f"neg{name[3:]}")
        if moved and other is None:
            del changed[name]
        else:
            changed[name] = [values[i] for i in kept_positives] + [other[i] for i in moved if other is not None]
    return changed


def _lists(record: Mapping[str, Any], name: str) -> dict[str, list[Any]]:
    """The list of passages ``pos`` or ``neg`` of a line, and all lists that have an entry for each of them."""
    count = len(record.get(name) or ())
    names = [n for n in record if n == name or n.startswith(f"{name}_")]
    return {n: record[n] for n in names if isinstance(record[n], list) and len(record[n]) == count}


def add_queries(record: dict[str, Any], verdicts: Mapping[str, Verdict]) -> int:
    """Put the queries that were written for negatives into ``neg_q`` where that has none; returns how many."""
    given = negative_queries(record)
    own = key_of(record["query"])
    entries = list(record.get("neg_q") or given)  # as the file spells them
    added = 0
    for i, text in enumerate(record.get("neg") or ()):
        verdict = verdicts.get(key_of(text))
        if not given[i] and verdict is not None and verdict.query and key_of(verdict.query) != own:
            entries[i] = [verdict.query]
            added += 1
    if added:
        record["neg_q"] = [entry or None for entry in entries]
    return added
