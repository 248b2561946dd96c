"""The format of training data, and the faults of lines that do not follow it.

One JSON object a line: FlagEmbedding's format, and the negative queries (the queries that a hard negative answers):

- ``query`` (string), ``pos`` (list of strings, at least one);
- ``neg``, optional: hard negatives, a list of strings, which may be empty;
- ``neg_q``, optional: the negative queries, a list as long as ``neg``, each entry a string, a list of strings or null;
- ``pos_scores`` and ``neg_scores``, optional: numbers, as many as ``pos`` and ``neg``;
- ``pos_guide_scores`` and ``neg_guide_scores``, optional, likewise: by a guide of ``mine``;
- ``prompt`` and ``type``, optional strings, as in FlagEmbedding.

Other fields (ids, for instance) are allowed and not used.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from clpl_moe.common.cli import command_name
from clpl_moe.common.errors import UserError, shorten
from clpl_moe.data.columns import rename
from clpl_moe.data.formats import DataFile, Line

_LARGEST_SCORE = 3.4028234663852886e38  # of float32, in which losses are computed


def find_faults(record: dict[str, Any], *, scores_required: bool = False) -> Iterator[str]:
    """All faults of a parsed line: field, what was found, and what is expected. With ``scores_required`` (knowledge
    distillation) it needs teacher scores."""
    if "query" in record:
        yield from _text("query", record["query"])
    else:
        yield _fault("query", "is missing, expected a string")
    yield from _passages(record, "pos")
    yield from _passages(record, "neg", required=scores_required)
    for field in ("prompt", "type"):
        if not isinstance(value := record.get(field), str | None):
            yield _fault(field, f"found {_found(value)}, expected a string")
    yield from _negative_queries(record)
    for texts in ("pos", "neg"):
        yield from _scores(record, f"{texts}_scores", texts, scores_required)
        yield from _scores(record, f"{texts}_guide_scores", texts, False)


def negative_queries(record: dict[str, Any]) -> list[list[str]]:
    """For each negative of a line without faults the queries that it answers, possibly none."""
    entries = record.get("neg_q") or [None] * len(record.get("neg") or ())
    return [[entry] if isinstance(entry, str) else list(entry or ()) for entry in entries]


def normalise(record: dict[str, Any], *, keep_scores: bool = False) -> dict[str, Any]:
    """A line without faults as the dataset stores it; absent fields are None."""
    return {
        "query": record["query"],
        "pos": record["pos"],
        "neg": record.get("neg") or [],
        "negative_queries": negative_queries(record),
        "pos_scores": [float(s) for s in record["pos_scores"]] if keep_scores else None,
        "neg_scores": [float(s) for s in record["neg_scores"]] if keep_scores else None,
        **guide_scores(record),
        "prompt": record.get("prompt"),
        "type": record.get("type"),
    }


def guide_scores(record: dict[str, Any]) -> dict[str, list[float] | None]:
    """The scores of a line without faults by a guide, or else by a teacher; None where it lacks those of either kind of
    passage."""
    for kind in ("guide_scores", "scores"):
        positives, negatives = record.get(f"pos_{kind}"), record.get(f"neg_{kind}")
        if positives and negatives:
            return {"pos_guide_scores": list(map(float, positives)), "neg_guide_scores": list(map(float, negatives))}
    return {"pos_guide_scores": None, "neg_guide_scores": None}


def checked_lines(file: DataFile, *, scores_required: bool = False) -> Iterator[Line]:
    """Every line of a file with all its faults, which validation reports and training refuses."""
    for line in file.lines():
        if line.record is not None:
            found = find_faults(line.record, scores_required=scores_required)
            line.faults += [rename(fault, line.origin) for fault in found]
            if line.number == 1 and line.faults and "is missing" in line.faults[0]:
                line.faults[0] += _other_names(file, line.record)
        yield line


def _other_names(file: DataFile, record: dict[str, Any]) -> str:
    """How to name the fields of a file whose first line lacks one that it needs."""
    if {"query", "pos"} <= record.keys():  # it lacks scores
        return ""
    there = shorten(", ".join(record), 100) or "{}"
    return f"; the line has {there}; if these are other names, write {file.name},query=NAME,pos=NAME"


def training_lines(files: Iterable[DataFile]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and fields of each line of the files, in order; raises :class:`UserError` at the first fault."""
    for file in files:
        for line in checked_lines(file):
            if line.faults or line.record is None:
                raise UserError(f"{line.place}: {line.faults[0]}")
            yield line.place, line.record


def read_examples(file: DataFile | str | Path, *, with_scores: bool = False) -> Iterator[dict[str, Any]]:
    """The normalised examples of one file.

    Raises:
        UserError: after the last line, with file, line and field of the first fault and the number of all.
    """
    if not isinstance(file, DataFile):
        file = DataFile(str(file), str(file))
    first, count = "", 0
    for line in checked_lines(file, scores_required=with_scores):
        if line.faults:
            first = first or f"{line.place}: {line.faults[0]}"
            count += len(line.faults)
        elif line.record is not None and not count:
            yield normalise(line.record, keep_scores=with_scores)
    if count > 1:
        asked = " --knowledge_distillation true" if with_scores else ""
        first += f" (the first of {count:,} faults; {command_name('clpl_moe.validate')} {file.name}{asked} lists them)"
    if count:
        raise UserError(first)


def _fault(field: str, message: str) -> str:
    return f"field '{field}': {message}"


def _found(value: Any) -> str:
    if value is None:
        return "null"
    return {str: "a string", bool: "a boolean", list: "a list", dict: "an object"}.get(type(value), "a number")


def _text(field: str, value: Any, expected: str = "a string", in_place_of_empty: str = "text") -> Iterator[str]:
    if not isinstance(value, str):
        yield _fault(field, f"found {_found(value)}, expected {expected}")
    elif not value.strip():
        yield _fault(field, f"found an empty string, expected {in_place_of_empty}")


def _texts(field: str, values: list[Any]) -> Iterator[str]:
    for index, value in enumerate(values):
        yield from _text(f"{field}[{index}]", value)


def _passages(record: dict[str, Any], field: str, required: bool = True) -> Iterator[str]:
    value = record.get(field)
    if not required and (value is None or value == []):  # the passages of other queries are its negatives
        return
    if field not in record:
        yield _fault(field, "is missing, expected a list of strings")
    elif not isinstance(value, list):
        yield _fault(field, f"found {_found(value)}, expected a list of strings")
    elif not value:
        yield _fault(field, "found an empty list, expected at least one passage")
    else:
        yield from _texts(field, value)


def _beside(record: dict[str, Any], field: str, texts: str, expected: str, entries: str) -> Iterator[str]:
    """Faults of a list whose entries belong to those of the list ``texts``; not those of the entries themselves."""
    value, beside = record[field], record.get(texts)
    if texts == "neg" and beside is None:
        beside = []
    if not isinstance(value, list):
        yield _fault(field, f"found {_found(value)}, expected {expected}")
    elif isinstance(beside, list) and len(value) != len(beside):
        yield _fault(field, f"found {len(value)} {entries}, expected {len(beside)}, one for each entry of '{texts}'")


def _negative_queries(record: dict[str, Any]) -> Iterator[str]:
    value = record.get("neg_q")
    if value is None:
        return
    yield from _beside(record, "neg_q", "neg", "a list as long as 'neg'", "entries")
    for index, entry in enumerate(value if isinstance(value, list) else ()):
        field = f"neg_q[{index}]"
        if isinstance(entry, list):
            yield from _texts(field, entry)
        elif entry is not None:
            expected = "a string, a list of strings or null"
            yield from _text(field, entry, expected, "text, or null where there is no query")


def _scores(record: dict[str, Any], field: str, texts: str, required: bool) -> Iterator[str]:
    value = record.get(field)
    if value is None:
        if required:
            expected = f"numbers, one for each entry of '{texts}' (knowledge_distillation)"
            yield _fault(field, f"is missing, expected {expected}")
        return
    yield from _beside(record, field, texts, "a list of numbers", "numbers")
    for index, score in enumerate(value if isinstance(value, list) else ()):
        if isinstance(score, bool) or not isinstance(score, (int, float)):
            yield _fault(f"{field}[{index}]", f"found {_found(score)}, expected a number")
        elif not abs(score) <= _LARGEST_SCORE:  # an int may be larger than any float
            found = "NaN" if isinstance(score, float) and math.isnan(score) else "a number too large"
            yield _fault(f"{field}[{index}]", f"found {found}, expected a finite number")
