"""The filters of negatives: which passages are left out since they probably answer the query.

1. Known answers: the query's relevant passages, and passages that have the same question among their queries
   (:attr:`MiningQuery.excluded`).
2. Passages nearly as similar to the query as its positive: ``max_positive_ratio`` (TopK-PercPos of NV-Retriever,
   arXiv:2407.15831) and ``margin``. Of several positives, ``positive_score`` says whose score that is.
3. Passages that a guide finds more similar to the query than its positive (:mod:`clpl_moe.mine.guide`).
4. Copies of a positive: a passage that holds nearly all of it, or is nearly all in it (``max_overlap``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

from clpl_moe.common.text_key import text_key
from clpl_moe.mine.index import PassageIndex
from clpl_moe.mine.options import PositiveScore, SelectionArguments
from clpl_moe.mine.rank import Candidate, MiningQuery

_PIECE = 5  # characters


def without_known_answers(candidates: Sequence[Candidate], query: MiningQuery) -> list[Candidate]:
    """The candidates that are not known to answer the query."""
    return [(place, score) for place, score in candidates if place not in query.excluded]


def below_ceiling(
    candidates: Sequence[Candidate], positive_scores: Sequence[float], selection: SelectionArguments
) -> list[Candidate]:
    """The candidates whose score is far enough below the positive's."""
    ceiling = highest_score(positive_scores, selection)
    return [(place, score) for place, score in candidates if score <= ceiling]


def highest_score(positive_scores: Sequence[float], selection: SelectionArguments) -> float:
    """The highest score that a negative may have."""
    positive = joined(positive_scores, selection.positive_score)
    limits = [math.inf]
    if selection.max_positive_ratio > 0:
        # Of a score below 0 (a reranker's) 95% would be above it.
        limits.append(positive - (1 - selection.max_positive_ratio) * abs(positive))
    if selection.margin is not None:
        limits.append(positive - selection.margin)
    return min(limits)


def joined(positive_scores: Sequence[float], rule: PositiveScore) -> float:
    """The one score that stands for those of all positives of a query."""
    if rule == "mean":
        return sum(positive_scores) / len(positive_scores)
    return min(positive_scores) if rule == "lowest" else max(positive_scores)


class CopyFilter:
    """Finds passages that have more than ``max_overlap`` of the shorter text's pieces in common with a positive."""

    def __init__(self, query: MiningQuery, index: PassageIndex, max_overlap: float) -> None:
        self._query, self._index, self._max_overlap = query, index, max_overlap

    @cached_property
    def _positives(self) -> list[set[str]]:
        return [_pieces(text) for text in self._query.positive_texts(self._index)]

    def is_copy(self, place: int) -> bool:
        if self._max_overlap >= 1:
            return False
        pieces = _pieces(self._index.texts[place])
        return any(len(p & pieces) > self._max_overlap * min(len(p), len(pieces)) for p in self._positives)


def _pieces(text: str) -> set[str]:
    """All runs of five characters of a text's key, without spaces: needs no words."""
    text = text_key(text).replace(" ", "")
    return {text[i : i + _PIECE] for i in range(max(1, len(text) - _PIECE + 1))}
