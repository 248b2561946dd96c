"""Negatives of queries, out of a corpus.

For each query:

1. All passages are ranked by cosine similarity to the query. Those known to answer it have no rank.
2. The window is ``rank_from`` to ``rank_to``. With a reranker, the passages up to ``rank_to`` are first scored and
   ordered anew by it; all that follows goes by its scores.
3. Passages of the window nearly as similar as the least similar positive probably answer the query as well: they are left
   out (``max_positive_ratio``: TopK-PercPos of NV-Retriever, arXiv:2407.15831; or ``margin``).
4. Of the rest, ``negatives`` are taken: the first ones, or drawn. Copies of a positive are passed over: a passage that
   holds nearly all of it, or is nearly all in it.

``sampling: corpus`` skips the first three: any passage not known to answer the query may be drawn.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from clpl_moe.common.errors import UserError
from clpl_moe.mine.index import PassageIndex, comparable
from clpl_moe.retrieval.options import Encoder, EncodingArguments

if TYPE_CHECKING:
    import torch

    from clpl_moe.mine.rerank import Reranker

Sampling = Literal["top", "random", "score", "corpus"]

# A query that more passages answer may find fewer negatives than asked for; without a bound it would deepen the search,
# and the memory that this takes, for all.
_MOST_EXCLUDED = 1000
_PIECE = 5  # characters
_QUERIES_AT_ONCE = 64
_ROWS_AT_ONCE = 4096


@dataclass
class SelectionArguments:
    """Which passages are taken as negatives."""

    # Chosen with benchmarks/false_negatives.py. The limit of 95% halves the false negatives of a multilingual E5 on Korean; to
    # rank 200 it leaves a third as many questions without any negative as to rank 60.
    rank_from: int = field(
        default=2, metadata={"help": "first rank of the window; rank 1 is too often right but not judged"}
    )
    rank_to: int = field(default=200, metadata={"help": "last rank of the window; known positives have no rank"})
    negatives: int = field(default=8, metadata={"help": "negatives for each query; training draws some each time"})
    sampling: Sampling = field(
        default="top",
        metadata={
            "help": "the window's first passages; any of it, all equally likely; any, similar ones more likely; or any passage"
            " of the whole corpus, without ranking and scores"
        },
    )
    sampling_temperature: float = field(
        default=0.02, metadata={"help": "of sampling score: a passage's weight is exp(score / temperature)"}
    )
    max_positive_ratio: float = field(
        default=0.95,
        metadata={"help": "highest score of a negative, as a share of the lowest positive's; 0: no such limit"},
    )
    margin: float | None = field(
        default=None,
        metadata={"help": "how far below the lowest positive's score a negative's must be; not given: no such limit"},
    )
    max_overlap: float = field(
        default=0.8,
        metadata={
            "help": "share of the shorter text that a negative and a positive may have in common, in pieces of 5 characters;"
            " 1: no such limit"
        },
    )

    def __post_init__(self) -> None:
        if not 1 <= self.rank_from <= self.rank_to:
            raise UserError(
                f"--rank_from {self.rank_from} --rank_to {self.rank_to}: expected 1 <= rank_from <= rank_to"
            )
        width = self.rank_to - self.rank_from + 1
        if self.negatives < 1 or (self.negatives > width and self.sampling != "corpus"):
            raise UserError(
                f"--negatives: found {self.negatives}, the window from rank {self.rank_from} to {self.rank_to} holds {width}"
            )
        if not 0 <= self.max_positive_ratio < math.inf:
            raise UserError(f"--max_positive_ratio: found {self.max_positive_ratio}, expected 0 (no limit) or more")
        if self.margin is not None and not math.isfinite(self.margin):
            raise UserError(f"--margin: found {self.margin}, expected a number")
        if not 0 < self.max_overlap <= 1:
            raise UserError(f"--max_overlap: found {self.max_overlap}, expected a share above 0, 1 for no limit")
        if not 0 < self.sampling_temperature < math.inf:
            raise UserError(f"--sampling_temperature: found {self.sampling_temperature}, expected a number above 0")

    def ceiling(self, positive_scores: Sequence[float]) -> float:
        """The highest score that a negative may have."""
        lowest = min(positive_scores)
        limits = [math.inf]
        if self.max_positive_ratio > 0:
            # Of a score below 0 (a reranker's) 95% would be above it.
            limits.append(lowest - (1 - self.max_positive_ratio) * abs(lowest))
        if self.margin is not None:
            limits.append(lowest - self.margin)
        return min(limits)


@dataclass
class MiningQuery:
    """A query that wants negatives.

    Attributes:
        key: seeds its draws, so that other queries do not matter.
        text: without prompt.
        positives: places of its positives in the index.
        excluded: places of all passages known to answer it, its positives among them.
        other_positives: texts of positives that the corpus does not hold.
    """

    key: str
    text: str
    positives: list[int]
    excluded: set[int]
    other_positives: list[str] = field(default_factory=list)


@dataclass
class Mined:
    """The negatives of one query.

    Attributes:
        places: in the index, best first.
        scores: one for each of them; None where none were computed.
        positive_scores: of the positives, then of the others; None where none were computed.
    """

    places: list[int]
    scores: list[float] | None
    positive_scores: list[float] | None


@dataclass
class Ranking:
    """Passages by similarity to each of Q queries.

    Attributes:
        scores: (Q, K) float32, best first.
        places: (Q, K) int64, in the index.
        positive_scores: of each query's positives, then of its other positives.
    """

    scores: torch.Tensor
    places: torch.Tensor
    positive_scores: list[list[float]]


def mine_negatives(
    queries: Sequence[MiningQuery],
    index: PassageIndex,
    selection: SelectionArguments,
    *,
    encoder: Encoder | None,
    encoding: EncodingArguments,
    seed: int | str,
    counts: Counter[str],
    reranker: Reranker | None = None,
    cache: Path | None = None,
    progress: bool = True,
) -> Iterator[Mined]:
    """The negatives of each query, in their order.

    Args:
        queries: each with a positive at least.
        index: of the corpus.
        selection: which passages to take.
        encoder: ranks the passages, by cosine whatever its settings say; None with ``sampling: corpus`` only.
        encoding: lengths and batch size.
        seed: of all draws, together with each query's key.
        counts: counts what was left out, and why.
        reranker: scores the window anew.
        cache: folder for embeddings of passages and the reranker's scores, from which an interrupted run goes on.
        progress: whether to show bars.
    """
    ranking = None
    if selection.sampling != "corpus":
        ranking = rank_passages(
            queries, index, selection.rank_to, encoder=encoder, encoding=encoding, cache=cache, progress=progress
        )
    yield from take(
        queries,
        ranking,
        index,
        selection,
        seed=seed,
        counts=counts,
        reranker=reranker,
        cache=cache,
        progress=progress,
    )


def take(
    queries: Sequence[MiningQuery],
    ranking: Ranking | None,
    index: PassageIndex,
    selection: SelectionArguments,
    *,
    seed: int | str,
    counts: Counter[str],
    reranker: Reranker | None = None,
    cache: Path | None = None,
    progress: bool = True,
) -> Iterator[Mined]:
    """The second half of :func:`mine_negatives`, whose arguments it takes, after :func:`rank_passages`."""
    if selection.sampling == "corpus":
        for query in queries:
            draw = random.Random(f"{seed} {query.key}")
            places = _choose(_shuffled(len(index), draw), query, index, selection, counts)
            yield Mined(places, None, None)
        return
    for start in _bar(range(0, len(queries), _QUERIES_AT_ONCE), "rerank", reranker is not None and progress):
        found = []
        for row in range(start, min(start + _QUERIES_AT_ONCE, len(queries))):
            pairs = zip(ranking.places[row].tolist(), ranking.scores[row].tolist())
            candidates = [(place, score) for place, score in pairs if place not in queries[row].excluded]
            found.append((queries[row], candidates[: selection.rank_to], ranking.positive_scores[row]))
        if reranker is not None:
            found = _rescore(found, index, reranker, cache)
        for query, candidates, of_positives in found:
            draw = random.Random(f"{seed} {query.key}")
            window = candidates[selection.rank_from - 1 :]
            ceiling = selection.ceiling(of_positives)
            allowed = [(place, score) for place, score in window if score <= ceiling]
            counts["passages left out: nearly as similar as a positive"] += len(window) - len(allowed)
            places = _choose(_in_order(allowed, selection, draw), query, index, selection, counts)
            score_of = dict(allowed)
            places.sort(key=[place for place, _ in allowed].index)
            yield Mined(places, [score_of[place] for place in places], of_positives)


def rank_passages(
    queries: Sequence[MiningQuery],
    index: PassageIndex,
    rank_to: int,
    *,
    encoder: Encoder,
    encoding: EncodingArguments,
    cache: Path | None = None,
    progress: bool = True,
) -> Ranking:
    """The passages most similar to each query, ``rank_to`` of them besides those that have no rank.

    With ``torch.distributed`` and a cache, processes share the encoding of the passages (all have to call this).
    """
    import torch

    from clpl_moe.retrieval.search import search
    from clpl_moe.retrieval.store import encode_passages, encode_queries

    encoder = dataclasses.replace(encoder, settings=dataclasses.replace(encoder.settings, normalize=True))
    query_embeddings = encode_queries(encoder, [query.text for query in queries], encoding, progress=progress)
    others = [text for query in queries for text in query.other_positives]
    other_embeddings = encode_passages(encoder, others, encoding, progress=progress) if others else None
    passages = encode_passages(encoder, index.texts, encoding, cache=cache, progress=progress)
    # Deep enough that the window is full when all that must not be in it has been taken out.
    depth = rank_to + min(_MOST_EXCLUDED, max(len(query.excluded) for query in queries))
    scores, places = search(query_embeddings.to(encoder.model.device), passages, depth)
    pairs = [(row, place) for row, query in enumerate(queries) for place in query.positives]
    positive_scores: list[list[float]] = [[] for _ in queries]
    for start in range(0, len(pairs), _ROWS_AT_ONCE):
        rows, wanted = zip(*pairs[start : start + _ROWS_AT_ONCE])
        products = (passages[torch.tensor(wanted)] * query_embeddings[list(rows)]).sum(dim=1)
        for row, score in zip(rows, products.tolist()):
            positive_scores[row].append(score)
    at = 0
    for row, query in enumerate(queries):
        if number := len(query.other_positives):
            positive_scores[row] += (other_embeddings[at : at + number] @ query_embeddings[row]).tolist()
            at += number
    return Ranking(scores, places, positive_scores)


Found = tuple[MiningQuery, list[tuple[int, float]], list[float]]


def _rescore(found: list[Found], index: PassageIndex, reranker: Reranker, cache: Path | None) -> list[Found]:
    """Candidates and positives with the reranker's scores, candidates ordered by them."""
    pairs = []
    for query, candidates, _ in found:
        places = [*(place for place, _ in candidates), *query.positives]
        pairs += [(query.text, text) for text in (*(index.texts[p] for p in places), *query.other_positives)]
    scores = iter(reranker.scores(pairs, cache))
    rescored = []
    for query, candidates, of_positives in found:
        again = [(place, next(scores)) for place, _ in candidates]
        of_positives = [next(scores) for _ in of_positives]
        rescored.append((query, sorted(again, key=lambda c: -c[1]), of_positives))
    return rescored


def _in_order(allowed: list[tuple[int, float]], selection: SelectionArguments, draw: random.Random) -> Iterator[int]:
    """Places in the order in which they are to be taken."""
    if selection.sampling == "top":
        return iter([place for place, _ in allowed])
    if selection.sampling == "random":
        return iter([place for place, _ in draw.sample(allowed, len(allowed))])
    # The greatest sums of logarithmic weight and Gumbel noise are a draw by these weights without putting back.
    keys = [s / selection.sampling_temperature - math.log(draw.expovariate(1) or 1e-300) for _, s in allowed]
    order = sorted(range(len(allowed)), key=lambda i: -keys[i])
    return iter([allowed[i][0] for i in order])


def _shuffled(count: int, draw: random.Random) -> Iterator[int]:
    """The numbers below ``count`` in a random order, of which few are asked for."""
    seen: set[int] = set()
    while len(seen) < count // 2:
        number = draw.randrange(count)
        if number not in seen:
            seen.add(number)
            yield number
    rest = [number for number in range(count) if number not in seen]
    yield from draw.sample(rest, len(rest))


def _choose(
    places: Iterator[int],
    query: MiningQuery,
    index: PassageIndex,
    selection: SelectionArguments,
    counts: Counter[str],
) -> list[int]:
    """The first of the places that are neither known to answer the query nor copies of a positive."""
    positives: list[set[str]] | None = None
    chosen: list[int] = []
    for place in places:
        if len(chosen) == selection.negatives:
            break
        if place in query.excluded:
            continue
        if selection.max_overlap < 1:
            if positives is None:
                texts = [*(index.texts[p] for p in query.positives), *query.other_positives]
                positives = [_pieces(text) for text in texts]
            pieces = _pieces(index.texts[place])
            if any(len(p & pieces) > selection.max_overlap * min(len(p), len(pieces)) for p in positives):
                counts["passages left out: nearly the same text as a positive"] += 1
                continue
        chosen.append(place)
    return chosen


def _pieces(text: str) -> set[str]:
    """All runs of five characters of a text, in the form that is compared and without spaces: needs no words."""
    text = comparable(text).replace(" ", "")
    return {text[i : i + _PIECE] for i in range(max(1, len(text) - _PIECE + 1))}


def _bar(values: Sequence[int], label: str, shown: bool):
    from tqdm.auto import tqdm

    return tqdm(values, desc=label, unit=f"{_QUERIES_AT_ONCE} queries", disable=not shown, leave=False)
