"""Retrieval collections in FlagEmbedding's layout.

``<dir>/<lang>/`` holds ``corpus.jsonl`` (``id``, ``title``, ``text``, optionally ``split``),
``{split}_queries.jsonl`` (``id``, ``text``) and ``{split}_qrels.jsonl`` (``qid``, ``docid``, ``relevance``).

A corpus may be larger than the memory: texts stay in the file, and memory holds each passage's id and the place of its
line.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import re
import sys
import threading
import unicodedata
import warnings
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, overload

import numpy as np

from clpl_moe.common.errors import UserError, at, no_such, type_name
from clpl_moe.common.files import parse_line, read_jsonl, read_lines

COLLECTION_FILES = ("corpus.jsonl", "*_queries.jsonl", "*_qrels.jsonl")  # of a language
_CUTS_IDS = re.compile("[\0 \t\n\v\f\r]")
_DECIMAL = re.compile(r"[+-]?\d+\.\d*")
_MOST_RELEVANT = 1000  # trec_eval's arithmetic overflows far above it, without a word


@dataclass
class Collection:
    """The passages of one language, and the queries and relevance judgements of one split."""

    directory: Path  # holds a folder per language
    language: str
    split: str  # which queries, such as dev
    passage_ids: Sequence[str] = field(repr=False)
    # Title and text of each passage, joined by a space; of a loaded collection, read from the file when it is asked for.
    passages: Sequence[str] = field(repr=False)
    query_ids: list[str] = field(repr=False)
    queries: list[str] = field(repr=False)
    # For each judged query, passage id -> relevance (above 0 is relevant).
    qrels: dict[str, dict[str, int]] = field(repr=False)
    # Passage id -> the split that alone may train on it, for passages that name one. All are searched in every split.
    reserved: dict[str, str] = field(default_factory=dict, repr=False)
    titled: int = 0  # how many passages have a title

    @classmethod
    def load(cls, directory: str | Path, language: str, split: str) -> Collection:
        """Read and check a collection.

        As in trec_eval, a relevant passage that the corpus lacks counts as never found. Such passages, and queries without
        a relevant passage, bring a warning. A file that is missing or empty, and a line that is broken, repeats an id or
        names an unknown query, raise :class:`UserError`.
        """
        directory = Path(directory)
        folder = language_folder(directory, language)
        queries_path, qrels_path = folder / f"{split}_queries.jsonl", folder / f"{split}_qrels.jsonl"
        if not queries_path.is_file():
            names = {path.name.removesuffix("_queries.jsonl") for path in folder.glob("*_queries.jsonl")}
            splits = ", ".join(sorted(names - {"positive"}))
            raise UserError(f"{at(queries_path)}: no such file" + (f"; the splits here are {splits}" if splits else ""))
        passage_ids, passages, reserved, titled = _read_corpus(folder / "corpus.jsonl")
        query_ids, queries = _read_queries(queries_path)
        qrels = _read_qrels(qrels_path, set(query_ids), queries_path)
        _warn_of_gaps(qrels_path, qrels, query_ids, passage_ids)
        return cls(directory, language, split, passage_ids, passages, query_ids, queries, qrels, reserved, titled)

    def own_passages(self) -> dict[str, int]:
        """Query id -> row of the passage that is the query itself: same id, contains its text, not judged relevant.

        In some sets of BEIR (ArguAna, Quora) queries are passages, too; there a query must not find itself.
        """
        texts = dict(zip(self.query_ids, self.queries))
        same = ((row, p) for row, p in enumerate(self.passage_ids) if p in texts)
        return {
            p: row for row, p in same if texts[p].strip() in self.passages[row] and self.qrels.get(p, {}).get(p, 0) <= 0
        }

    def fingerprint(self) -> str:
        """Hash of the ids, texts and judgements: equal for equal content, wherever the files lie."""

        def content() -> Iterator[str]:
            for ids, texts in ((self.passage_ids, self.passages), (self.query_ids, self.queries)):
                yield str(len(ids))
                yield from chain.from_iterable(zip(ids, texts))
            for query_id, judged in sorted(self.qrels.items()):
                yield from (query_id, str(len(judged)))
                for passage_id, grade in sorted(judged.items()):
                    yield from (passage_id, str(grade))

        return hash_texts(content())


def load_passages(directory: str | Path, language: str) -> Sequence[str]:
    """The passages of a collection as :meth:`Collection.load` reads and checks them, without the queries."""
    return _read_corpus(language_folder(directory, language) / "corpus.jsonl")[1]


class LazyTexts(Sequence[str]):
    """Strings that :meth:`_get` makes on access."""

    def _get(self, place: int) -> str:
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self._get(place) for place in range(*index.indices(len(self)))]
        return self._get(range(len(self))[operator.index(index)])  # a range knows of negative and of missing places

    def __iter__(self) -> Iterator[str]:
        return map(self._get, range(len(self)))


class _PackedTexts(LazyTexts):
    """Short strings in one block of memory; a list of strings takes several times as much."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._ends = array("q", [0])

    def append(self, text: str) -> None:
        self._bytes += text.encode()
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def _get(self, place: int) -> str:
        return self._bytes[self._ends[place] : self._ends[place + 1]].decode()


class _CorpusTexts(LazyTexts):
    """The passages of a checked corpus file, read from the bytes where their lines begin."""

    def __init__(self, path: Path, starts: array[int]) -> None:
        self._path = path
        # Stays open, so that a new file of this name changes nothing. Windows would translate the ends of lines.
        self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._file)
        self._position = threading.Lock()
        self._starts = starts
        self._end = os.fstat(self._file).st_size

    def __reduce__(self) -> tuple:
        return _CorpusTexts, (self._path, self._starts)  # an open file is of no use to another process

    def __len__(self) -> int:
        return len(self._starts)

    def _get(self, place: int) -> str:
        start = self._starts[place]
        end = self._starts[place + 1] if place + 1 < len(self) else self._end
        try:
            # Blank lines may follow. `loads` of bytes knows the byte-order mark.
            return _passage_text(json.loads(self._read(start, end - start).partition(b"\n")[0]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{at(self._path)}: changed while it was in use; start again") from None

    def _read(self, start: int, length: int) -> bytes:
        if hasattr(os, "pread"):  # which leaves alone the position that forked processes share
            return os.pread(self._file, length, start)
        with self._position:  # Windows, where no process is forked, but threads read
            os.lseek(self._file, start, os.SEEK_SET)
            return os.read(self._file, length)


def hash_texts(texts: Iterable[str]) -> str:
    """Hash of a list of texts, each with its length, so that no two lists have the same."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def check_language(language: str) -> None:
    """Raise :class:`UserError` where a language cannot be the name of a folder; results are written to it."""
    if language in ("", ".", "..") or language != Path(language).name or "\0" in language:
        raise UserError(f"language: found {language!r}, expected the name of a folder, such as ko")
    if language in ("True", "False"):
        raise UserError(
            f"language: found {language!r}, which is what YAML makes of words such as no; put it into quotes"
        )


def check_id(identifier: str, path: str | Path, line: int | None, field: str) -> None:
    """Raise :class:`UserError` for an id that is empty, or that TREC's files or trec_eval (code 0) would cut.

    White space is ASCII's there: an id may hold, say, a space that does not break.
    """
    if not is_id(identifier):
        raise UserError(f"{at(path, line, field)}: found {identifier!r}, expected an id without white space")


def is_id(value: Any) -> bool:
    """Whether a value is an id that TREC's files and trec_eval take."""
    return isinstance(value, str) and value != "" and _CUTS_IDS.search(value) is None


ID = "a string or a whole number"  # what messages expect


def read_id(value: Any) -> Any:
    """An id as a string; many files have numbers."""
    return str(value) if type(value) is int else value


def read_relevance(value: Any) -> int | None:
    """A relevance as JSON or a line of text has it, ``1``, ``1.0`` or ``"1"``; None where it is no whole number."""
    if isinstance(value, str):
        try:
            value = float(value) if _DECIMAL.fullmatch(value) else int(value)
        except ValueError:
            return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int else None


def check_relevance(relevance: int, path: str | Path, line: int | None, field: str) -> None:
    """Raise :class:`UserError` for a relevance that trec_eval cannot compute with."""
    if abs(relevance) > _MOST_RELEVANT:
        raise UserError(f"{at(path, line, field)}: found {relevance}, expected at most {_MOST_RELEVANT}")


def normalize_text(text: str) -> str:
    """A text's form for comparisons: Unicode NFC, runs of white space as one space."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def read_positive_queries(path: str | Path) -> Iterator[tuple[str, list[str]]]:
    """Passage id and known queries of each line of a ``positive_queries.jsonl`` (``docid``, ``queries``), checked."""
    for line, record in read_jsonl(path):
        docid = _identifier(path, line, record, "docid")
        queries = _get(path, line, record, "queries", list, "a list of strings")
        for query in queries:
            if not isinstance(query, str) or not query.strip():
                raise UserError(f"{at(path, line, 'queries')}: found {query!r}, expected strings that are not empty")
        yield docid, queries


def _read_corpus(path: Path) -> tuple[_PackedTexts, _CorpusTexts, dict[str, str], int]:
    ids, splits, titled = _PackedTexts(), {}, 0
    starts, lines, hashes = array("q"), array("q"), array("q")
    for line, start, raw in read_lines(path):
        record = parse_line(path, line, raw)
        identifier = _identifier(path, line, record, "id")
        _get(path, line, record, "text", str, "a string")
        if not isinstance(title := record.get("title") or "", str):
            raise UserError(f"{at(path, line, 'title')}: found {type_name(title)}, expected a string")
        if record.get("split") is not None:
            splits[identifier] = sys.intern(_get(path, line, record, "split", str, "a string"))
        titled += bool(title.strip())
        ids.append(identifier)
        starts.append(start)
        lines.append(line)
        hashes.append(hash(identifier))
    # Sorted hashes take a tenth of the memory of a dictionary of ids; ids of equal hashes are compared.
    order = np.argsort(hashes, kind="stable")
    ordered = np.asarray(hashes)[order]
    pairs = np.flatnonzero(ordered[1:] == ordered[:-1])
    twice = [(second, first) for first, second in zip(order[pairs], order[pairs + 1]) if ids[first] == ids[second]]
    if twice:
        second, first = min(twice)
        raise UserError(f"{at(path, lines[second], 'id')}: '{ids[second]}' stands on line {lines[first]} already")
    return ids, _CorpusTexts(path, starts), splits, titled


def _passage_text(record: dict[str, Any]) -> str:
    return f"{record.get('title') or ''} {record['text']}".strip()  # as FlagEmbedding joins them


def _read_queries(path: Path) -> tuple[list[str], list[str]]:
    lines: dict[str, int] = {}
    texts: list[str] = []
    for line, record in read_jsonl(path):
        identifier = _identifier(path, line, record, "id")
        if identifier in lines:
            raise UserError(f"{at(path, line, 'id')}: '{identifier}' stands on line {lines[identifier]} already")
        text = _get(path, line, record, "text", str, "a string")
        if not text.strip():
            raise UserError(f"{at(path, line, 'text')}: the query is empty")
        lines[identifier] = line
        texts.append(text)
    return list(lines), texts


def _read_qrels(path: Path, query_ids: set[str], queries_path: Path) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    for line, record in read_jsonl(path):
        query_id = _identifier(path, line, record, "qid")
        passage_id = _identifier(path, line, record, "docid")
        relevance = read_relevance(record.get("relevance"))
        if relevance is None or isinstance(record["relevance"], str):
            found = repr(record["relevance"]) if "relevance" in record else "nothing"
            raise UserError(f"{at(path, line, 'relevance')}: found {found}, expected an integer")
        check_relevance(relevance, path, line, "relevance")
        if query_id not in query_ids:
            raise UserError(f"{at(path, line, 'qid')}: '{query_id}' is not an id of {queries_path}")
        judged = qrels.setdefault(query_id, {})
        if passage_id in judged:
            raise UserError(f"{at(path, line, 'docid')}: '{passage_id}' is judged twice for query '{query_id}'")
        judged[passage_id] = relevance
    return qrels


def _warn_of_gaps(
    path: Path, qrels: dict[str, dict[str, int]], query_ids: list[str], passage_ids: Iterable[str]
) -> None:
    unknown = {passage_id for judged in qrels.values() for passage_id, grade in judged.items() if grade > 0}
    unknown.difference_update(passage_ids)
    gaps = []
    if unknown:
        found = f"{len(unknown)} relevant passages are not in the corpus, such as '{min(unknown)}'"
        gaps.append(f"{found}; they count as never found")
    if unjudged := sum(query_id not in qrels for query_id in query_ids):
        gaps.append(f"{unjudged} queries have no line here and are left out of the metrics")
    if without := sum(not any(grade > 0 for grade in judged.values()) for judged in qrels.values()):
        gaps.append(f"{without} queries have no relevant passage; they score 0, as in trec_eval")
    for gap in gaps:
        warnings.warn(f"{path}: {gap}", stacklevel=3)


def _identifier(path: str | Path, line: int, record: dict[str, Any], name: str) -> str:
    if name in record:
        record[name] = read_id(record[name])
    identifier = _get(path, line, record, name, str, ID)
    check_id(identifier, path, line, name)
    return identifier


def _get(path: str | Path, line: int, record: dict[str, Any], name: str, kind: type, expected: str) -> Any:
    if name not in record:
        raise UserError(
            f"{at(path, line, name)}: missing, expected {expected}; the line has {', '.join(record) or '{}'}"
        )
    if not isinstance(record[name], kind):
        raise UserError(f"{at(path, line, name)}: found {type_name(record[name])}, expected {expected}")
    return record[name]


def language_folder(directory: str | Path, language: str) -> Path:
    """The folder of a language's collection; :class:`UserError` where there is none, which says what there is."""
    directory = Path(directory)
    check_language(language)
    if not (folder := directory / language).is_dir():
        there = f"holds {', '.join(sorted(p.parent.name for p in directory.glob('*/corpus.jsonl'))) or 'no collection'}"
        if (directory / "corpus.jsonl").is_file():
            there = "is a collection itself, name the folder above it"
        if not directory.is_dir():
            raise UserError(
                f"{at(directory)}: {no_such('folder', directory)} of collections, with a folder {language} in it"
            )
        raise UserError(f"{at(folder)}: {no_such('folder', folder)}; {directory} {there}")
    return folder
