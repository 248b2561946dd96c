"""The format of training data, and the faults of lines that do not follow it.

One JSON object a line: FlagEmbedding's format, and the negative queries, which are the queries that a hard negative
answers:

- ``query`` (string), ``pos`` (list of strings, at least one), ``neg`` (list of strings, at least one);
- ``neg_q``, optional: the negative queries, a list as long as ``neg``, each entry a string, a list of strings or null;
- ``pos_scores`` and ``neg_scores``, optional: numbers, as many as ``pos`` and ``neg``;
- ``prompt`` and ``type``, optional strings, as in FlagEmbedding.

Other fields (ids, for instance) are allowed and not used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clpl_moe.common.cli import command_name
from clpl_moe.common.errors import UserError, at
from clpl_moe.common.files import inspect_line, read_lines

SUFFIXES = (".jsonl", ".json")

# The largest number of float32, in which losses are computed.
_LARGEST_SCORE = 3.4028234663852886e38


@dataclass(frozen=True)
class Fault:
    """A fault of one field: what was found, and what is expected."""

    field: str
    message: str

    def __str__(self) -> str:
        return f"field '{self.field}': {self.message}"


def find_faults(record: dict[str, Any], *, scores_required: bool = False) -> Iterator[Fault]:
    """All faults of one line.

    Args:
        record: the parsed line.
        scores_required: whether teacher scores must be there (knowledge distillation).
    """
    yield from _string(record, "query", required=True)
    for field in ("pos", "neg"):
        yield from _strings(record, field)
    for field in ("prompt", "type"):
        yield from _string(record, field, required=False)
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
    """The faults of a line, which validation reports and training refuses.

    Args:
        number: of the line, from 1.
        raw: its bytes.
        scores_required: whether teacher scores must be there (knowledge distillation).

    Returns:
        The line as an object (None where it is no object), and all its faults, without file and line number.
    """
    record, faults = inspect_line(number, raw)
    if record is not None:
        faults += map(str, find_faults(record, scores_required=scores_required))
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
    """The files that the option ``train_data`` names; of a folder its ``.jsonl`` and ``.json`` files in order of names.

    Raises:
        UserError: a path does not exist, or a folder holds no such file.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and p.is_file())
            if not found:
                raise UserError(f"{at(path)}: the folder holds no .jsonl or .json file, expected training data")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"{at(path)}: no such file or folder, expected training data (train_data)")
    return files


def _found(value: Any) -> str:
    if value is None:
        return "null"
    return {str: "a string", bool: "a boolean", list: "a list", dict: "an object"}.get(type(value), "a number")


def _blank(value: Any) -> bool:
    return isinstance(value, str) and (not value or value.isspace())


def _string(record: dict[str, Any], field: str, *, required: bool) -> Iterator[Fault]:
    value = record.get(field)
    if field not in record or (value is None and not required):
        if required:
            yield Fault(field, "is missing, expected a string")
    elif not isinstance(value, str):
        yield Fault(field, f"found {_found(value)}, expected a string")
    elif required and _blank(value):
        yield Fault(field, "found an empty string, expected text")


def _strings(record: dict[str, Any], field: str) -> Iterator[Fault]:
    if field not in record:
        yield Fault(field, "is missing, expected a list of strings")
        return
    value = record[field]
    if not isinstance(value, list):
        yield Fault(field, f"found {_found(value)}, expected a list of strings")
    elif not value:
        yield Fault(field, "found an empty list, expected at least one passage")
    else:
        yield from _texts(field, value)


def _texts(field: str, values: list[Any]) -> Iterator[Fault]:
    for index, value in enumerate(values):
        if not isinstance(value, str):
            yield Fault(f"{field}[{index}]", f"found {_found(value)}, expected a string")
        elif _blank(value):
            yield Fault(f"{field}[{index}]", "found an empty string, expected text")


def _negative_queries(record: dict[str, Any]) -> Iterator[Fault]:
    value = record.get("neg_q")
    if value is None:
        return
    if not isinstance(value, list):
        yield Fault("neg_q", f"found {_found(value)}, expected a list as long as 'neg'")
        return
    negatives = record.get("neg")
    if isinstance(negatives, list) and len(value) != len(negatives):
        yield Fault("neg_q", f"found {len(value)} entries, expected {len(negatives)}, one for each entry of 'neg'")
    for index, entry in enumerate(value):
        if isinstance(entry, list):
            yield from _texts(f"neg_q[{index}]", entry)
        elif entry is not None and not isinstance(entry, str):
            yield Fault(f"neg_q[{index}]", f"found {_found(entry)}, expected a string, a list of strings or null")
        elif _blank(entry):
            yield Fault(f"neg_q[{index}]", "found an empty string, expected text, or null where there is no query")


def _scores(record: dict[str, Any], field: str, texts: str, required: bool) -> Iterator[Fault]:
    value = record.get(field)
    if value is None:
        if required:
            yield Fault(
                field,
                f"is missing, expected numbers, one for each entry of '{texts}' (knowledge_distillation)",
            )
        return
    if not isinstance(value, list):
        yield Fault(field, f"found {_found(value)}, expected a list of numbers")
        return
    if isinstance(record.get(texts), list) and len(value) != len(record[texts]):
        yield Fault(
            field,
            f"found {len(value)} numbers, expected {len(record[texts])}, one for each entry of '{texts}'",
        )
    for index, score in enumerate(value):
        if isinstance(score, bool) or not isinstance(score, (int, float)):
            yield Fault(f"{field}[{index}]", f"found {_found(score)}, expected a number")
        elif not abs(score) <= _LARGEST_SCORE:  # an int may be larger than any float
            found = "NaN" if isinstance(score, float) and math.isnan(score) else "a number too large"
            yield Fault(f"{field}[{index}]", f"found {found}, expected a finite number")
