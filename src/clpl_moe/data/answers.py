"""What is known to answer a query, in all files of a training set: numbers in arrays, no texts.

A passage is known to answer a query that it is a positive of, in any line, and a query that stands with it in ``neg_q``.
Texts go by their ids (:func:`clpl_moe.common.text_key.text_id`), so that all copies of a text count as one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import datasets

_ROWS_AT_ONCE = 10_000
Pairs = tuple[np.ndarray, np.ndarray]  # (K,) int64 each: a query, and a passage


class KnownAnswers:
    """Ids of the passages that are known to answer each query of several."""

    def __init__(self, pairs: Iterable[Pairs]) -> None:
        parts = list(pairs)
        queries, answers = (np.concatenate([part[side] for part in parts]) for side in (0, 1))
        order = np.lexsort((answers, queries))
        queries, answers = queries[order], answers[order]
        new = np.ones(len(queries), dtype=bool)
        new[1:] = (queries[1:] != queries[:-1]) | (answers[1:] != answers[:-1])
        self._queries, self._answers = queries[new], answers[new]

    def of(self, query: int) -> np.ndarray:
        """The ids of the passages that are known to answer a query; (k,) int64."""
        start, end = np.searchsorted(self._queries, query, "left"), np.searchsorted(self._queries, query, "right")
        return self._answers[start:end]

    def __len__(self) -> int:
        return len(self._queries)

    def hold(self, pairs: Pairs) -> np.ndarray:
        """Which of the pairs are known; (K,) bool."""
        wanted = _joined(pairs)
        places = np.minimum(np.searchsorted(self._sorted, wanted), max(0, len(self._sorted) - 1))
        return self._sorted[places] == wanted if len(self._sorted) else np.zeros(len(wanted), dtype=bool)

    @cached_property
    def _sorted(self) -> np.ndarray:
        return np.sort(_joined((self._queries, self._answers)))

    def forget_single(self) -> None:
        """Keep queries with several answers only: the one answer of a query comes with each of its examples."""
        new = np.ones(len(self._queries), dtype=bool)
        new[1:] = self._queries[1:] != self._queries[:-1]
        counts = np.diff(np.append(np.flatnonzero(new), len(new)))
        several = np.repeat(counts > 1, counts)
        self._queries, self._answers = self._queries[several], self._answers[several]
        self.__dict__.pop("_sorted", None)


def _joined(pairs: Pairs) -> np.ndarray:
    """One number for each pair; of two different pairs the same by a chance of 1 in 2⁶⁴."""
    queries, answers = (part.astype(np.uint64) for part in pairs)
    return queries * np.uint64(0x9E3779B97F4A7C15) ^ answers


def known_pairs(examples: datasets.Dataset) -> Iterator[Pairs]:
    """The queries of all lines and the passages that answer them."""
    for table in examples.with_format("arrow").iter(_ROWS_AT_ONCE):
        yield _beside(table["query_id"], table["pos_ids"])
        negatives, queries = (table[name].combine_chunks().flatten() for name in ("neg_ids", "negative_query_ids"))
        passages, queries = _beside(negatives, queries)
        yield queries, passages


def all_answer_all(examples: datasets.Dataset, known: KnownAnswers | None) -> tuple[int, int] | None:
    """How many queries and positives the examples have, where each positive answers each query, so that none is a negative
    of another's; None otherwise. With ``known`` None a query is answered by what its own example says."""
    queries, positives = (np.unique(part) for part in _queries_and_positives(examples))
    if known is None:
        return (len(queries), 1) if len(positives) == 1 else None
    if len(queries) * len(positives) > len(known) + len(queries):  # too many to be known, and to be looked up
        return None
    pairs = np.repeat(queries, len(positives)), np.tile(positives, len(queries))
    answered = known.hold(pairs) | (pairs[0] == pairs[1])
    return (len(queries), len(positives)) if answered.all() else None


def _queries_and_positives(examples: datasets.Dataset) -> Pairs:
    tables = examples.select_columns(["query_id", "pos_ids"]).with_format("arrow").iter(_ROWS_AT_ONCE)
    parts = [_beside(table["query_id"], table["pos_ids"]) for table in tables]
    return np.concatenate([q for q, _ in parts]), np.concatenate([p for _, p in parts])


def count_negatives(examples: datasets.Dataset, known: KnownAnswers) -> tuple[np.ndarray, np.ndarray, int]:
    """How many negatives each line has, (N,) int64; which lines have none in the file, (N,) bool; and how many are left out in
    all: those that are known to answer their query or are the query, and those that stand in their line twice."""
    counts, given = [], []
    for table in examples.with_format("arrow").iter(_ROWS_AT_ONCE):
        queries, negatives = _beside(table["query_id"], table["neg_ids"])
        rows, _ = _beside(np.arange(len(table)), table["neg_ids"])
        usable = ~known.hold((queries, negatives)) & (queries != negatives)
        order = np.lexsort((negatives, rows))
        repeated = np.zeros(len(rows), dtype=bool)
        repeated[order[1:]] = (rows[order[1:]] == rows[order[:-1]]) & (negatives[order[1:]] == negatives[order[:-1]])
        counts.append(np.bincount(rows[usable & ~repeated], minlength=len(table)))
        given.append(np.bincount(rows, minlength=len(table)))
    found, in_file = np.concatenate(counts), np.concatenate(given)
    return found, in_file == 0, int((in_file - found).sum())


def _beside(values: Any, lists: Any) -> Pairs:
    """Each of the values once for every entry of its list, and these entries."""
    lists = lists.combine_chunks() if hasattr(lists, "combine_chunks") else lists
    lengths = lists.value_lengths().to_numpy(zero_copy_only=False)
    entries = lists.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
    values = values if isinstance(values, np.ndarray) else values.to_numpy()
    return np.repeat(values, lengths), entries
