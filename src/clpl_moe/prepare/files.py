"""Reading the files of a source line by line, plain or compressed, with the place of each fault."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from clpl_moe.common.compressed import naming_damage, open_bytes, plain_name
from clpl_moe.common.errors import UserError, at
from clpl_moe.common.files import is_blank, parse_line
from clpl_moe.prepare.source import Passage
from clpl_moe.retrieval.collection import ID, check_id, check_relevance, read_id, read_relevance

# TREC's files have no other between their fields: an id may hold a space that does not break.
_ASCII_SPACE = re.compile(r"[ \t\v\f\r]+")


def read_source_lines(path: Path, bar: Any = None) -> Iterator[tuple[int, bytes]]:
    """Line number (from 1) and bytes of each line that is not blank, of a plain or a compressed file.

    A tqdm bar is moved by the bytes of the file on disk.
    """
    number, done, empty = 0, 0, True
    with open_bytes(path) as (content, raw), naming_damage(path, lambda: number + 1):
        for number, line in enumerate(content, 1):
            if bar is not None and number % 1000 == 0:
                bar.update(raw.tell() - done)
                done = raw.tell()
            if not is_blank(line):
                empty = False
                yield number, line
        if bar is not None:
            bar.update(raw.tell() - done)
    if empty:
        raise UserError(f"{at(path)}: the file is empty; fetch this file again")


def read_texts(path: Path, id_field: str, bar: Any = None) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Line number, id and object of each line of a JSONL file; its ``text`` and ``title`` (may be missing) are strings."""
    for number, raw in read_source_lines(path, bar):
        record = parse_line(path, number, raw)
        for name in (id_field, "text", "title"):
            if name == id_field and name in record:
                record[name] = read_id(record[name])
            if name == "title" and record.get(name) is None:
                record[name] = ""
            elif not isinstance(record.get(name), str):
                found = f"{record[name]!r:.50}" if name in record else f"only {', '.join(record) or '{}'}"
                raise UserError(
                    f"{at(path, number, name)}: found {found}, expected {ID if name == id_field else 'a string'}"
                )
        check_id(record[id_field], path, number, id_field)
        yield number, record[id_field], record


def read_passages(paths: Sequence[Path], id_field: str) -> Iterator[Passage]:
    """The passages of JSONL files (``text``, perhaps ``title``); a bar shows the bytes read."""
    from tqdm import tqdm

    count = 0
    size = sum(path.stat().st_size for path in paths if path.is_file())
    with tqdm(total=size, unit="B", unit_scale=True, desc="passages") as bar:
        for path in paths:
            for number, identifier, record in read_texts(path, id_field, bar):
                count += 1
                yield Passage(identifier, record["text"], record["title"], at(path, number))
            bar.set_postfix_str(f"{count:,} passages")


def read_table(path: Path) -> Iterator[tuple[int, str]]:
    """Line number and text, without the line's end, of each line of a text file."""
    for number, raw in read_source_lines(path):
        try:
            # The byte-order mark that some editors write is no part of the text.
            yield number, raw.decode("utf-8-sig").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{at(path, number)}: not UTF-8 text ({error.reason})") from None


def collect_queries(path: Path, lines: Iterable[tuple[int, str, str]], id_field: str) -> dict[str, str]:
    """The queries of a file, id -> text, of the number, id and text of each line; an id that stands twice is an error."""
    queries: dict[str, str] = {}
    numbers: dict[str, int] = {}
    for number, identifier, text in lines:
        if identifier in numbers:
            place = at(path, number, id_field)
            raise UserError(f"{place}: '{identifier}' stands on line {numbers[identifier]} already")
        if not text.strip():
            raise UserError(f"{at(path, number, 'text')}: the query is empty")
        numbers[identifier], queries[identifier] = number, text
    return queries


def read_qrels(
    path: Path, fields: Sequence[str], queries: Mapping[str, str], queries_path: Path, *, header: bool = False
) -> dict[tuple[str, str], int]:
    """The judgements of a file with one a line: (query id, passage id) -> relevance.

    Lines are JSON objects, or fields with white space between them: the first is the query's id, the last two are the
    passage's id and the relevance. With ``header`` the first line may hold names of fields (it counts as such where its last
    is no number), and there may be three or four: those of TREC have one more, which means nothing.
    """
    judgements: dict[tuple[str, str], int] = {}
    is_json, begun = plain_name(path).endswith(".jsonl"), False
    for number, line in _json_judgements(path, fields) if is_json else _judgements(path, fields, either=header):
        query_id, passage_id, relevance = line
        first, begun = not begun, True
        grade = read_relevance(relevance)
        if grade is None:
            if header and first and not is_json and not _is_number(relevance):
                continue
            raise UserError(f"{at(path, number, fields[-1])}: found {relevance!r}, expected an integer")
        check_relevance(grade, path, number, fields[-1])
        if query_id not in queries:
            raise UserError(f"{at(path, number, fields[0])}: '{query_id}' is not an id of {queries_path}")
        check_id(passage_id, path, number, fields[-2])
        if judgements.setdefault((query_id, passage_id), grade) != grade:
            raise UserError(
                f"{at(path, number, fields[-1])}: found {grade}, but an earlier line judges '{passage_id}' for query"
                f" '{query_id}' as {judgements[query_id, passage_id]}"
            )
    return judgements


def _is_number(text: str) -> bool:
    with contextlib.suppress(ValueError):
        float(text)
        return True
    return False


_Judgements = Iterator[tuple[int, tuple[Any, Any, Any]]]  # line, then query id, passage id and relevance


def _judgements(path: Path, fields: Sequence[str], either: bool) -> _Judgements:
    for number, line in read_table(path):
        words = _ASCII_SPACE.split(line.strip(" \t\v\f\r"))
        if len(words) not in ((3, 4) if either else (len(fields),)):
            expected = f"{len(fields)}: {', '.join(fields)}"
            raise UserError(f"{at(path, number)}: found {len(words)} fields, expected {expected}")
        yield number, (words[0], words[-2], words[-1])


def _json_judgements(path: Path, fields: Sequence[str]) -> _Judgements:
    """Of objects with these names of fields, or FlagEmbedding's."""
    for number, raw in read_source_lines(path):
        record = parse_line(path, number, raw)
        values = []
        for name, other in zip((fields[0], *fields[-2:]), ("qid", "docid", "relevance")):
            if name not in record and other not in record:
                raise UserError(f"{at(path, number, name)}: missing; the line has {', '.join(record) or '{}'}")
            values.append(record[name] if name in record else record[other])
        for place, name in ((0, fields[0]), (1, fields[-2])):
            values[place] = read_id(values[place])
            if not isinstance(values[place], str):
                raise UserError(f"{at(path, number, name)}: found {values[place]!r:.50}, expected {ID}")
        yield number, (values[0], values[1], values[2])
