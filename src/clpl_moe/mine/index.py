"""A corpus as mining sees it: equal passages once, and what each is known to answer; numbers only, texts stay on disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from clpl_moe.common.text_key import text_id, text_key
from clpl_moe.retrieval.collection import Collection, LazyTexts, read_positive_queries

_ID_OF_EMPTY = text_id("")


class PassageIndex:
    """A collection's passages without repeated and empty texts, and the queries that they are known to answer.

    Texts of one key (:func:`clpl_moe.common.text_key.text_key`) are one passage. Kept for each passage are 24 bytes (a row,
    an id and a place), plus the queries of those that have any: by the collection's
    judgements, and by ``positive_queries`` (passage id and queries), of which unknown ids are counted and left out.

    Attributes:
        source: the collection's folder.
        corpus: all passages of the collection.
        rows: for each distinct passage (its *place*), the first row of the corpus that holds it.
        ids: the id of the text at each place.
        texts: the text at each place, read when asked for.
        unknown: number of entries of ``positive_queries`` that name no passage of the corpus.
        reserved, repeated: number of passages of another split, and of empty ones and those equal to an earlier one.
    """

    def __init__(self, collection: Collection, positive_queries: Iterable[tuple[str, Sequence[str]]] = ()) -> None:
        self._collection = collection
        self.source = collection.directory / collection.language
        self.corpus = collection.passages
        queries = dict(zip(collection.query_ids, collection.queries))
        stored = list(positive_queries)
        judged = [(p, q) for q, grades in collection.qrels.items() for p, grade in grades.items() if grade > 0]
        wanted = {p for p, _ in judged} | {p for p, _ in stored}
        row_of: dict[str, int] = {}
        hashes = np.zeros(len(collection.passage_ids), dtype=np.int64)
        usable = np.zeros(len(hashes), dtype=bool)
        self.reserved = 0
        for row, (passage_id, text) in enumerate(zip(collection.passage_ids, collection.passages)):
            if collection.reserved.get(passage_id, collection.split) != collection.split:
                self.reserved += 1
                continue
            if passage_id in wanted:
                row_of[passage_id] = row
            hashes[row] = text_id(text)
            usable[row] = hashes[row] != _ID_OF_EMPTY
        rows = np.flatnonzero(usable)
        found, first, group = np.unique(hashes[rows], return_index=True, return_inverse=True)
        order = np.argsort(first)
        self.rows: np.ndarray = rows[first[order]]
        self.ids: np.ndarray = found[order]
        self._by_id = np.argsort(order)  # places, in the order of ids
        place_of_row = np.full(len(hashes), -1, dtype=np.int64)
        place_of_row[rows] = self._by_id[group]
        self.repeated = len(hashes) - self.reserved - len(self.rows)
        self.texts: Sequence[str] = _Rows(collection.passages, self.rows)
        self._number = {p: int(place_of_row[row]) for p, row in row_of.items() if place_of_row[row] >= 0}
        # Place -> the queries that its passage answers, by the query's key; and the other way round.
        self._queries: dict[int, dict[int, str]] = {}
        self._answering: dict[int, set[int]] = {}
        self.unknown = 0
        for passage_id, query_id in judged:
            self._add(passage_id, queries[query_id])
        for passage_id, texts in stored:
            self.unknown += passage_id not in self._number
            for query in texts:
                self._add(passage_id, query)

    @classmethod
    def load(cls, collection: Collection, positive_queries: str | Path | None = None) -> PassageIndex:
        """With a file of positive queries; None: the collection's own ``positive_queries.jsonl``, where there is one."""
        own = Path(collection.directory, collection.language, "positive_queries.jsonl")
        if positive_queries is None and not own.exists():
            return cls(collection)
        return cls(collection, read_positive_queries(own if positive_queries is None else positive_queries))

    def __len__(self) -> int:
        return len(self.rows)

    def texts_at(self, places: np.ndarray) -> Sequence[str]:
        """Texts of some places, read when asked for."""
        return _Rows(self.texts, places)

    def _add(self, passage_id: str, query: str) -> None:
        if (place := self._number.get(passage_id)) is not None:
            key = text_id(query)
            self._queries.setdefault(place, {}).setdefault(key, query)
            self._answering.setdefault(key, set()).add(place)

    def relevant(self, judged: Mapping[str, int]) -> list[int]:
        """Places of the relevant passages that the corpus has, each once."""
        found = (self._number[p] for p, relevance in judged.items() if relevance > 0 and p in self._number)
        return list(dict.fromkeys(found))

    def negative_queries(self, place: int) -> list[str]:
        """The queries that a passage is known to answer: as a negative it brings them along."""
        return list(self._queries.get(place, {}).values())

    def negative_query_ids(self, place: int) -> list[int]:
        """The ids of :meth:`negative_queries`."""
        return list(self._queries.get(place, {}))

    def answering(self, query: str) -> set[int]:
        """Places of the passages that are known to answer a query."""
        return self.answering_id(text_id(query))

    def answering_id(self, query: int) -> set[int]:
        """Places of the passages that are known to answer a query, which goes by its id."""
        return self._answering.get(query, set())

    def themselves(self) -> dict[str, set[int]]:
        """Places of the passages that are queries themselves (:meth:`Collection.own_passages`), by the query's key:
        a query is no negative of its own."""
        texts = dict(zip(self._collection.query_ids, self._collection.queries))
        found: dict[str, set[int]] = {}
        for query_id, row in self._collection.own_passages().items():
            if (place := self.find(self._collection.passages[row])) is not None:
                found.setdefault(text_key(texts[query_id]), set()).add(place)
        return found

    def find(self, text: str) -> int | None:
        """The place of a text; None where the corpus does not hold it, or reserves it to another split."""
        return self.find_id(text_id(text))

    def find_id(self, number: int) -> int | None:
        """The place of a text that goes by its id; None as in :meth:`find`."""
        found = int(np.searchsorted(self.ids, number, sorter=self._by_id))
        place = None if found == len(self.ids) else int(self._by_id[found])
        return place if place is not None and self.ids[place] == number else None

    def passage_id(self, place: int) -> str:
        """The id of a place's passage: of equal ones the first."""
        return self._collection.passage_ids[int(self.rows[place])]

    def places(self, passage_ids: set[str]) -> dict[str, int]:
        """Passage id -> place, of those that have one. Of equal passages each id has their place: a checkpoint may have
        been written when they did not count as equal."""
        rows = ((p, row) for row, p in enumerate(self._collection.passage_ids) if p in passage_ids)
        found = ((p, self.find(self._collection.passages[row])) for p, row in rows)
        return {p: place for p, place in found if place is not None}


class _Rows(LazyTexts):
    def __init__(self, values: Sequence[str], rows: np.ndarray) -> None:
        self._values, self._rows = values, rows

    def __len__(self) -> int:
        return len(self._rows)

    def _get(self, place: int) -> str:
        return self._values[int(self._rows[place])]
