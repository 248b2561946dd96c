"""The format of training data, and the faults of lines that do not follow it.

One JSON object a line: FlagEmbedding's format, and the negative queries (the queries that a hard negative answers):

- ``query`` (string), ``pos`` (list of strings, at least one), ``neg`` (list of strings, at least one);
- ``neg_q``, optional: the negative queries, a list as long as ``neg``, each entry a string, a list of strings or null;
- ``pos_scores`` and ``neg_scores``, optional: numbers, as many as ``pos`` and ``neg``;
- ``prompt`` and ``type``, optional strings, as in FlagEmbedding.

Other fields (ids, for instance) are allowed and not used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clpl_moe.common.cli import command_name
from clpl_moe.common.errors import UserError, at
from clpl_moe.common.files import inspect_line, read_lines

_LARGEST_SCORE = 3.4028234663852886e38  # of float32, in which losses are computed


def find_faults(record: dict[str, Any], *, scores_required: bool = False) -> Iterator[str]:
    """All faults of a parsed line: field, what was found, and what is expected. With ``scores_required`` (knowledge
    distillation) it needs teacher scores."""
    if "query" in record:
        yield from _text("query", record["query"])
    else:
        yield _fault("query", "is missing, expected a string")
    for field in ("pos", "neg"):
        yield from _passages(record, field)
    for field in ("prompt", "type"):
        if not isinstance(value := record.get(field), str | None):
            yield _fault(field, f"found {_found(value)}, expected a string")
    yield from _negative_queries(record)
    for field, texts in (("pos_scores", "pos"), ("neg_scores", "neg")):
        yield from _scores(record, field, texts, scores_required)


def negative_queries(record: dict[str, Any]) -> list[list[str]]:
    """For each negative of a line without faults the queries that it answers, possibly none."""
    entries = record.get("neg_q") or [None] * len(record["neg"])
    return [[entry] if isinstance(entry, str) else list(entry or ()) for entry in entries]


def normalise(record: dict[str, Any], *, keep_scores: bool = False) -> dict[str, Any]:
    """A line without faults as the dataset stores it; absent fields are None."""
    return {
        "query": record["query"],
        "pos": record["pos"],
        "neg": record["neg"],
        "negative_queries": negative_queries(record),
        "pos_scores": [float(s) for s in record["pos_scores"]] if keep_scores else None,
        "neg_scores": [float(s) for s in record["neg_scores"]] if keep_scores else None,
        "prompt": record.get("prompt"),
        "type": record.get("type"),
    }


def check_line(number: int, raw: bytes, *, scores_required: bool = False) -> tuple[dict[str, Any] | None, list[str]]:
    """Line ``number`` (from 1) as an object, or None, and its faults, which validation reports and training refuses."""
    record, faults = inspect_line(number, raw)
    if record is not None:
        faults += find_faults(record, scores_required=scores_required)
    return record, faults


def read_examples(path: str | Path, *, with_scores: bool = False) -> Iterator[dict[str, Any]]:
    """The normalised examples of one file.

    Raises:
        UserError: after the last line, with file, line and field of the first fault and the number of all.
    """
    first, count = "", 0
    for number, _, raw in read_lines(path):
        record, faults = check_line(number, raw, scores_required=with_scores)
        if faults:
            first = first or f"{at(path, number)}: {faults[0]}"
            count += len(faults)
        elif record is not None and not count:
            yield normalise(record, keep_scores=with_scores)
    if count > 1:
        first += f" (the first of {count:,} faults; {command_name('clpl_moe.validate')} {path} lists them)"
    if count:
        raise UserError(first)


def data_files(paths: list[str]) -> list[Path]:
    """The files that ``train_data`` names; of a folder its ``.jsonl`` and ``.json`` files in order of names.

    Raises:
        UserError: a path does not exist, or a folder holds no such file.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix in (".jsonl", ".json") and p.is_file())
            if not found:
                raise UserError(f"{at(path)}: the folder holds no .jsonl or .json file, expected training data")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"{at(path)}: no such file or folder, expected training data (train_data)")
    return files


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


def _passages(record: dict[str, Any], field: str) -> Iterator[str]:
    value = record.get(field)
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
