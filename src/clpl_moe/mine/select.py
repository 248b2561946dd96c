"""The negatives of queries, out of a corpus.

For each query:

1. All passages are ranked by cosine similarity to the query (:mod:`clpl_moe.mine.rank`). Passages known to answer it
   have no rank.
2. The window is ``rank_from`` to ``rank_to``. A reranker first scores and orders the passages up to ``rank_to`` anew;
   all later steps go by its scores (:mod:`clpl_moe.mine.rerank`).
3. Passages that probably answer the query are left out (:mod:`clpl_moe.mine.filters`).
4. Of the rest, ``negatives`` are taken: the first ones, or drawn (:mod:`clpl_moe.mine.sampling`).

``sampling: corpus`` skips the ranking and its filters: any passage not known to answer the query may be drawn.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from clpl_moe.encoder import Encoder
from clpl_moe.mine.filters import CopyFilter, below_ceiling, without_known_answers
from clpl_moe.mine.index import PassageIndex
from clpl_moe.mine.options import SelectionArguments
from clpl_moe.mine.rank import MiningQuery, Ranking, rank_passages
from clpl_moe.mine.rerank import Reranker, Scored, rescore
from clpl_moe.mine.sampling import in_order, shuffled
from clpl_moe.retrieval.options import EncodingArguments

_QUERIES_AT_ONCE = 64


@dataclass
class Negatives:
    """The negatives of one query.

    Attributes:
        places: in the index, best first.
        scores: one for each of them; None where none were computed.
        positive_scores: of the positives, then of the others; None where none were computed.
    """

    places: list[int]
    scores: list[float] | None
    positive_scores: list[float] | None


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
) -> Iterator[Negatives]:
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
        if encoder is None:
            raise ValueError(f"sampling '{selection.sampling}' ranks passages, expected an encoder")
        ranking = rank_passages(
            queries, index, selection.rank_to, encoder=encoder, encoding=encoding, cache=cache, progress=progress
        )
    yield from select_negatives(
        queries, ranking, index, selection, seed=seed, counts=counts, reranker=reranker, cache=cache, progress=progress
    )


def select_negatives(
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
) -> Iterator[Negatives]:
    """The second half of :func:`mine_negatives`, whose arguments it takes, after :func:`rank_passages`.

    ``ranking`` is None with ``sampling: corpus``.
    """
    if ranking is None:
        for query in queries:
            draw = random.Random(f"{seed} {query.key}")
            yield Negatives(_take(shuffled(len(index), draw), query, index, selection, counts), None, None)
        return
    for start in _bar(range(0, len(queries), _QUERIES_AT_ONCE), "rerank", reranker is not None and progress):
        found = []
        for row in range(start, min(start + _QUERIES_AT_ONCE, len(queries))):
            candidates = list(zip(ranking.places[row].tolist(), ranking.scores[row].tolist()))
            candidates = without_known_answers(candidates, queries[row])[: selection.rank_to]
            found.append(Scored(queries[row], candidates, ranking.positive_scores[row]))
        if reranker is not None:
            found = rescore(found, index, reranker, cache)
        for one in found:
            draw = random.Random(f"{seed} {one.query.key}")
            window = one.candidates[selection.rank_from - 1 :]
            allowed = below_ceiling(window, one.positive_scores, selection)
            counts["passages left out: nearly as similar as a positive"] += len(window) - len(allowed)
            places = _take(in_order(allowed, selection, draw), one.query, index, selection, counts)
            score_of = dict(allowed)
            places.sort(key=[place for place, _ in allowed].index)
            yield Negatives(places, [score_of[place] for place in places], one.positive_scores)


def _take(
    places: Iterator[int],
    query: MiningQuery,
    index: PassageIndex,
    selection: SelectionArguments,
    counts: Counter[str],
) -> list[int]:
    """The first of the places that are neither known to answer the query nor copies of a positive."""
    copies = CopyFilter(query, index, selection.max_overlap)
    taken: list[int] = []
    for place in places:
        if len(taken) == selection.negatives:
            break
        if place in query.excluded:
            continue
        if copies.is_copy(place):
            counts["passages left out: nearly the same text as a positive"] += 1
            continue
        taken.append(place)
    return taken


def _bar(values: Sequence[int], label: str, shown: bool) -> Iterable[int]:
    from tqdm.auto import tqdm

    return tqdm(values, desc=label, unit=f"{_QUERIES_AT_ONCE} queries", disable=not shown, leave=False)
