"""The distinct passages of training files, these with a corpus to search, and the files again with queries put in."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clpl_moe.common.errors import UserError
from clpl_moe.data.formats import DataFile
from clpl_moe.data.schema import negative_queries, training_lines
from clpl_moe.retrieval.collection import LazyTexts, normalize_text


@dataclass
class Passage:
    """A distinct passage of the training files."""

    text: str  # as it first occurs
    ids: list[str] = field(default_factory=list)  # all that the files give it
    negative: bool = False  # whether it occurs as a negative
    bare: bool = False  # whether it does so without a query
    negative_queries: dict[str, str] = field(default_factory=dict)  # that it answers, by normalised text


def passage_key(text: str) -> str:
    """The same for texts that count as equal."""
    return hashlib.sha256(normalize_text(text).encode()).hexdigest()[:32]


def read_passages(files: Sequence[DataFile]) -> dict[str, Passage]:
    """The distinct passages of training files, positives included, by :func:`passage_key`; every line is checked."""
    passages: dict[str, Passage] = {}
    owner: dict[str, str] = {}

    def add(record: dict[str, Any], field_name: str, index: int, text: str, place: str) -> Passage:
        key = passage_key(text)
        passage = passages.setdefault(key, Passage(text))
        if (ids := record.get(field_name)) is not None:
            identifier = ids[index] if isinstance(ids, list) and index < len(ids) else None
            if not isinstance(identifier, str):
                raise UserError(f"{place}: field '{field_name}': expected a list of strings, one for each passage")
            if owner.setdefault(identifier, key) != key:
                raise UserError(f"{place}: field '{field_name}': '{identifier}' had another text before")
            if identifier not in passage.ids:
                passage.ids.append(identifier)
        return passage

    for place, record in training_lines(files):
        for index, text in enumerate(record["pos"]):
            passage = add(record, "pos_ids", index, text, place)
            passage.negative_queries.setdefault(normalize_text(record["query"]), record["query"])
        for index, (text, queries) in enumerate(zip(record.get("neg") or (), negative_queries(record))):
            passage = add(record, "neg_ids", index, text, place)
            passage.negative = True
            passage.bare |= not queries
            for query in queries:
                passage.negative_queries.setdefault(normalize_text(query), query)
    return passages


class SearchedPassages(LazyTexts):
    """The passages of training files, in their order, and after them the other texts of a corpus.

    Of equal texts there is one. Those of the corpus are read when they are asked for: 8 bytes are kept of each.
    """

    def __init__(self, own: Mapping[str, Passage], corpus: Sequence[str] = ()) -> None:
        self._own = [passage.text for passage in own.values()]
        self._corpus = corpus
        keys = itertools.chain(own, map(passage_key, corpus))
        hashes = np.fromiter((int(key[:16], 16) for key in keys), np.uint64, len(own) + len(corpus))
        self._rows = np.sort(np.unique(hashes, return_index=True)[1])

    def __len__(self) -> int:
        return len(self._rows)

    def _get(self, place: int) -> str:
        row = int(self._rows[place])
        return self._own[row] if row < len(self._own) else self._corpus[row - len(self._own)]


def fill_lines(files: Sequence[DataFile], queries: Mapping[str, Sequence[str]], most: int) -> Iterator[dict[str, Any]]:
    """The lines of training files, ``neg_q`` filled where it had no query with up to ``most`` of a passage's ``queries``,
    by its key. A line's own query is never given to a negative of that line."""
    for _, record in training_lines(files):
        own = normalize_text(record["query"])
        given = negative_queries(record)
        entries = list(record.get("neg_q") or given)  # as the file spells them
        for index, text in enumerate(record.get("neg") or ()):
            if not given[index]:
                fitting = (q for q in queries.get(passage_key(text), ()) if normalize_text(q) != own)
                entries[index] = list(fitting)[:most] or None
        yield {**record, "neg_q": entries}
