"""The texts of files and folders, whatever their fields are called."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clpl_moe.common.compressed import plain_name
from clpl_moe.common.errors import UserError, at
from clpl_moe.common.files import read_jsonl, read_lines

_ENDINGS = (".jsonl", ".txt")


def text_files(names: Sequence[str]) -> list[Path]:
    """The files that names stand for; of a folder, all of JSON lines and text in it."""
    if "" in names:  # as a path it is the current folder
        raise UserError("found an empty name, expected files or folders of text")
    files: list[Path] = []
    for path in map(Path, names):
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.is_file() and plain_name(file).endswith(_ENDINGS))
            if not found:
                raise UserError(f"{at(path)}: no file of text, expected some that end in {' or '.join(_ENDINGS)}")
            files += found
        elif not path.exists():
            raise UserError(f"{at(path)}: no such file or folder")
        elif not plain_name(path).endswith(_ENDINGS):
            raise UserError(f"{at(path)}: found a file of another kind, expected {' or '.join(_ENDINGS)}")
        else:
            files.append(path)
    return files


def read_texts(files: Sequence[Path]) -> Iterator[str]:
    """The lines of text files, and all strings of JSON lines but ids; a title also with its text, as in a collection."""
    for file in files:
        if plain_name(file).endswith(".jsonl"):
            for _, record in read_jsonl(file):
                title, text = record.get("title"), record.get("text")
                if title and isinstance(title, str) and isinstance(text, str):
                    yield f"{title} {text}"
                yield from _strings(record)
        else:
            for number, _, raw in read_lines(file, expected="a text a line"):
                try:
                    yield raw.decode("utf-8-sig").rstrip("\r\n")
                except UnicodeDecodeError:
                    raise UserError(f"{at(file, number)}: the line is not UTF-8") from None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, inner in value.items():
            if not name.endswith(("id", "ids")):
                yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
