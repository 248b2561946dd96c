"""The negatives of queries, out of a corpus.

For each query:

1. All passages are ranked by cosine similarity to the query (:mod:`clpl_moe.mine.rank`). Passages known to answer it
   have no rank.
2. The window is ``rank_from`` to ``rank_to``. A reranker first scores and orders the passages up to ``rank_to`` anew;
   all later steps go by its scores (:mod:`clpl_moe.mine.rerank`).
3. Passages that probably answer the query are left out (:mod:`clpl_moe.mine.filters`), also by the scores of a guide
   (:mod:`clpl_moe.mine.guide`).
4. Of the rest, ``negatives`` are taken: the first ones, or drawn.

``sampling: corpus`` skips the ranking and its filters: any passage not known to answer the query may be drawn.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from clpl_moe.encoder import Encoder
from clpl_moe.mine.filters import CopyFilter, below_ceiling, joined, without_known_answers
from clpl_moe.mine.guide import Guide
from clpl_moe.mine.index import PassageIndex
from clpl_moe.mine.options import SelectionArguments
from clpl_moe.mine.rank import Candidate, MiningQuery, Ranking, rank_passages
from clpl_moe.mine.rerank import Reranker, Scored, rescore
from clpl_moe.retrieval.options import EncodingArguments

_QUERIES_AT_ONCE = 64


@dataclass
class Negatives:
    """The negatives of one query; no scores where none were computed."""

    places: list[int]  # in the index, best first
    scores: list[float] | None
    positive_scores: list[float] | None  # of positives that the index holds, then of the others
    too_similar: int = 0  # passages of the window that are left out, since they score nearly as high as the positive
    guide_scores: list[float] | None = None  # of the negatives, where there is a guide
    positive_guide_scores: list[float] | None = None  # of positives that the index holds


@dataclass(kw_only=True)
class NegativeMiner:
    """Finds the negatives of queries.

    The encoder ranks the passages, by cosine whatever its settings say; it is None with ``sampling: corpus`` only. From
    ``cache``, a folder for embeddings and the reranker's scores, an interrupted run goes on.
    """

    index: PassageIndex
    selection: SelectionArguments
    encoding: EncodingArguments = field(default_factory=EncodingArguments)
    encoder: Encoder | None = None
    seed: int | str = 42  # of all draws, together with each query's key
    counts: Counter[str] = field(default_factory=Counter)  # what was left out, and why
    reranker: Reranker | None = None
    guide: Guide | None = None
    guide_margin: float = 0.0
    cache: Path | None = None
    progress: bool = True
    jointly: bool = False  # the other processes of torchrun call share_ranking meanwhile

    def mine(self, queries: Sequence[MiningQuery]) -> Iterator[Negatives]:
        """The negatives of each query, in their order; each query has a positive at least.

        With ``torch.distributed`` and a cache, processes share the encoding of the passages (all have to call this).
        """
        ranking = None
        if self.selection.sampling != "corpus":
            if self.encoder is None:
                raise ValueError(f"sampling '{self.selection.sampling}' ranks passages, expected an encoder")
            how = (self.encoder, self.encoding, self.cache, self.progress, self.jointly)
            ranking = rank_passages(queries, self.index, self.selection.rank_to, *how)
        yield from self.select(queries, ranking)

    def select(self, queries: Sequence[MiningQuery], ranking: Ranking | None) -> Iterator[Negatives]:
        """The second half of :meth:`mine`, after the ranking; None with ``sampling: corpus``."""
        if ranking is None:
            for query in queries:
                yield Negatives(self._take(shuffled(len(self.index), self._draw(query)), query), None, None)
            return

        def candidates(row: int) -> list[Candidate]:
            ranked = list(zip(ranking.places[row].tolist(), ranking.scores[row].tolist()))
            return without_known_answers(ranked, queries[row])[: self.selection.rank_to]

        if self.guide is not None:
            seen = (place for row in range(len(queries)) for place, _ in candidates(row))
            self.guide.read(queries, self.index, seen)
        starts = range(0, len(queries), _QUERIES_AT_ONCE)
        hidden = self.reranker is None or not self.progress
        for start in tqdm(starts, "rerank", unit=f"{_QUERIES_AT_ONCE} queries", disable=hidden, leave=False):
            rows = range(start, min(start + _QUERIES_AT_ONCE, len(queries)))
            found = [Scored(queries[row], candidates(row), ranking.positive_scores[row]) for row in rows]
            if self.reranker is not None:
                found = rescore(found, self.index, self.reranker, self.cache)
            yield from map(self._select, rows, found)

    def _select(self, row: int, scored: Scored) -> Negatives:
        window = scored.candidates[self.selection.rank_from - 1 :]
        allowed = below_ceiling(window, scored.positive_scores, self.selection)
        too_similar = len(window) - len(allowed)
        self.counts["passages left out: nearly as similar as a positive"] += too_similar
        by_guide: dict[int, float] = {}
        positive_guide_scores = None
        if self.guide is not None:
            by_guide, positive_guide_scores = self._approved(self.guide, row, scored.query, allowed)
            allowed = [(place, score) for place, score in allowed if place in by_guide]
        taken = set(self._take(_in_order(allowed, self.selection, self._draw(scored.query)), scored.query))
        best_first = [(place, score) for place, score in allowed if place in taken]
        places, scores = [place for place, _ in best_first], [score for _, score in best_first]
        guide_scores = None if positive_guide_scores is None else [by_guide[place] for place in places]
        return Negatives(places, scores, scored.positive_scores, too_similar, guide_scores, positive_guide_scores)

    def _approved(
        self, guide: Guide, row: int, query: MiningQuery, candidates: Sequence[Candidate]
    ) -> tuple[dict[int, float], list[float]]:
        """By place, the guide's scores of the candidates that it does not take for answers; and its scores of the positives."""
        places = [place for place, _ in candidates]
        positive_scores = guide.scores(row, query.positives)
        ceiling = joined(positive_scores, self.selection.positive_score) - self.guide_margin
        found = {place: score for place, score in zip(places, guide.scores(row, places)) if score <= ceiling}
        self.counts["passages left out: too similar by the guide"] += len(candidates) - len(found)
        return found, positive_scores

    def _take(self, places: Iterator[int], query: MiningQuery) -> list[int]:
        """The first of the places that are neither known to answer the query nor copies of a positive."""
        copies = CopyFilter(query, self.index, self.selection.max_overlap)
        taken: list[int] = []
        for place in places:
            if len(taken) == self.selection.negatives:
                break
            if place in query.excluded:
                continue
            if copies.is_copy(place):
                self.counts["passages left out: nearly the same text as a positive"] += 1
            else:
                taken.append(place)
        return taken

    def _draw(self, query: MiningQuery) -> random.Random:
        return random.Random(f"{self.seed} {query.key}")


def _in_order(allowed: Sequence[Candidate], selection: SelectionArguments, draw: random.Random) -> Iterator[int]:
    """The places of the candidates in the order in which they are taken."""
    if selection.sampling == "random":
        allowed = draw.sample(allowed, len(allowed))
    elif selection.sampling == "score":
        # The greatest sums of logarithmic weight and Gumbel noise are a draw by these weights without putting back.
        keys = [s / selection.sampling_temperature - math.log(draw.expovariate(1) or 1e-300) for _, s in allowed]
        allowed = [allowed[i] for i in sorted(range(len(allowed)), key=lambda i: -keys[i])]
    return (place for place, _ in allowed)


def shuffled(count: int, draw: random.Random) -> Iterator[int]:
    """The numbers below ``count`` in a random order, of which few are asked for."""
    seen: set[int] = set()
    while len(seen) < count // 2:
        number = draw.randrange(count)
        if number not in seen:
            seen.add(number)
            yield number
    rest = [number for number in range(count) if number not in seen]
    yield from draw.sample(rest, len(rest))
