"""Strings of others (from models, data, options) in Markdown, in code and in CSV: shown as they are, and never more."""

from __future__ import annotations

import csv
import json
import re
from typing import IO, Any

_FORMULA = re.compile(r"'*[=+\-@\t\r]")


def in_markdown(text: object) -> str:
    """A text within a line or a cell of a table; no markup of its own, no line of its own."""
    return re.sub(r"([\\`<>\[\]|*&$])", r"\\\1", " ".join(str(text).split()))


def as_code(text: object) -> str:
    """A text as inline code of Markdown, also in a cell of a table."""
    line = " ".join(str(text).split()).replace("|", "\\|")
    ticks = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    space = " " if line[:1] == "`" or line[-1:] == "`" else ""
    return f"{ticks}{space}{line}{space}{ticks}"


def as_python(text: object) -> str:
    """A text as a string of Python, in double quotes and on one line."""
    return json.dumps(str(text), ensure_ascii=False)


def to_csv(text: str) -> str:
    """A cell that no spreadsheet takes for a formula: an apostrophe stands before what could be one."""
    return f"'{text}" if _FORMULA.match(text) else text


def from_csv(cell: str) -> str:
    """The text of which :func:`to_csv` made a cell."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def csv_writer(file: IO[str], delimiter: str = ",") -> Any:
    """A ``csv.writer`` whose rows end in a line feed, and whose cells are in quotes where they hold any end of a line.

    With ``lineterminator="\\n"`` some versions of Python leave a carriage return bare, and readers end the row there.
    """
    return csv.writer(_LineFeeds(file), delimiter=delimiter, lineterminator="\r\n")


class _LineFeeds:
    """A file for rows that end in a carriage return and a line feed, of which it takes the line feed alone."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def write(self, row: str) -> int:
        return self._file.write(f"{row[:-2]}\n")
