"""Which negatives of a training file are none: what answers a query, by the key that training compares texts by."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from clpl_moe.common.text_key import text_id
from clpl_moe.data.answers import KnownAnswers, Pairs
from clpl_moe.data.scripts import script_of
from clpl_moe.retrieval.collection import normalize_text

OTHER_POSITIVES = "equal queries with other positives"
POSITIVE = "negatives that equal a positive"
OTHER_BYTES = "of these in other bytes"
ELSEWHERE = "negatives that another line knows to answer"
ITSELF = "negatives that are their query"
TWICE = "negatives given twice in a line"
SINGLE = "lines with a single negative"
SHARED = "lines whose positive answers another query, too"
KINDS_OF_ANSWERS = (OTHER_POSITIVES, POSITIVE, OTHER_BYTES, ELSEWHERE, ITSELF, TWICE, SINGLE, SHARED)


class Answers:
    """Counts of negatives that are none, and of what makes them, over the lines of one file."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter(dict.fromkeys(KINDS_OF_ANSWERS, 0))
        self.first: dict[str, int] = {}  # kind -> number of the first line with it
        self.scripts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS_OF_ANSWERS}  # of the queries
        self.queries: Counter[str] = Counter()  # script -> number of lines
        self._ids: dict[int, int] = {}
        self._positives_of: dict[int, frozenset[int]] = {}
        # Ids side by side: of a query and what answers it; of a query, its negative and the line. And each line's script.
        self._known, self._negatives = (array("q"), array("q")), (array("q"), array("q"), array("q"))
        self._positives = (array("q"), array("q"), array("q"))
        self._script_of: dict[int, str] = {}

    def _id(self, text: str) -> int:
        """A text's id. Passages come many times; a hash takes less memory than a text."""
        found = self._ids.get(key := hash(text))
        if found is None:
            found = self._ids[key] = text_id(text)
        return found

    def add(self, number: int, example: dict[str, Any]) -> None:
        """Take in line ``number``, as the dataset stores it."""
        query, positives = self._id(example["query"]), list(map(self._id, example["pos"]))
        negatives = list(map(self._id, example["neg"]))
        script = next(filter(None, map(script_of, example["query"])), "no letters")
        self.queries[script] += 1
        self._script_of[number] = script
        own = set(positives)
        texts = set(map(normalize_text, example["pos"]))
        equal = [text for text, of_text in zip(example["neg"], negatives) if of_text in own]
        usable = set(negatives) - own - {query}
        known = self._positives_of.setdefault(query, frozenset(own))
        for kind, times in (
            (OTHER_POSITIVES, known != own),
            (POSITIVE, len(equal)),
            (OTHER_BYTES, sum(normalize_text(text) not in texts for text in equal)),
            (ITSELF, negatives.count(query)),
            (TWICE, len(negatives) - len(set(negatives))),
            (SINGLE, len(usable) == 1),
        ):
            self._count(kind, number, int(times))
        for of_text in positives:
            _append(self._known, query, of_text)
            _append(self._positives, query, of_text, number)
        for of_text, queries in zip(negatives, example["negative_queries"]):
            if of_text in usable:
                _append(self._negatives, query, of_text, number)
            for text in queries:
                _append(self._known, self._id(text), of_text)

    def _count(self, kind: str, number: int, times: int) -> None:
        if times:
            self.counts[kind] += times
            self.first[kind] = min(number, self.first.get(kind, number))
            self.scripts[kind][self._script_of[number]] += times

    def close(self) -> None:
        """Count what takes all lines to know."""
        queries, passages, lines = map(_numbers, self._negatives)
        for number in lines[KnownAnswers([self.known]).hold((queries, passages))].tolist():
            self._count(ELSEWHERE, number, 1)
        queries, passages, lines = map(_numbers, self._positives)
        order = np.lexsort((queries, passages))
        queries, passages, lines = queries[order], passages[order], lines[order]
        starts = np.flatnonzero(np.append(True, passages[1:] != passages[:-1])) if len(passages) else passages
        several = (
            np.minimum.reduceat(queries, starts) != np.maximum.reduceat(queries, starts) if len(starts) else starts
        )
        shared = np.repeat(several, np.diff(np.append(starts, len(passages))))
        for number in np.unique(lines[shared.astype(bool)]).tolist():
            self._count(SHARED, number, 1)
        self._script_of, self._ids, self._positives_of = {}, {}, {}

    @property
    def known(self) -> Pairs:
        """Queries and what answers them, by ids."""
        return _numbers(self._known[0]), _numbers(self._known[1])

    def held_by(self, known: KnownAnswers) -> int:
        """How many negatives, those that equal a positive of their line aside, are known to answer their query."""
        return int(known.hold((_numbers(self._negatives[0]), _numbers(self._negatives[1]))).sum())

    def rows(self) -> Iterable[tuple[str, str]]:
        """Each kind and its count, by script where the queries have several."""
        for kind, times in self.counts.items():
            scripts = ", ".join(f"{script} {count:,}" for script, count in self.scripts[kind].most_common())
            by_script = f" ({scripts})" if scripts and len(self.queries) > 1 else ""
            first = f", first in line {self.first[kind]:,}" if kind in self.first else ""
            yield kind, f"{times:,}{by_script}{first}"


def answers_in_other_files(files: Sequence[Answers]) -> int:
    """How many negatives only the lines of another file know to answer their query."""
    if len(files) < 2:
        return 0
    known = KnownAnswers(file.known for file in files)
    return sum(file.held_by(known) - file.counts[ELSEWHERE] for file in files)


def _append(columns: tuple[array, ...], *values: int) -> None:
    for column, value in zip(columns, values, strict=True):
        column.append(value)


def _numbers(column: array) -> np.ndarray:
    return np.frombuffer(column, dtype=np.int64) if len(column) else np.zeros(0, dtype=np.int64)
