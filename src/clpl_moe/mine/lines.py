"""The training lines that mining writes, one for each query.

A line has FlagEmbedding's fields ``query``, ``pos``, ``neg``, ``pos_scores`` and ``neg_scores`` (cosines, or the reranker's
scores), ``pos_guide_scores`` and ``neg_guide_scores`` where there is a guide, the penalty's ``neg_q``, and the ids:
``query_id``, ``pos_ids``, ``neg_ids`` (of equal passages the first).
Prompts are not written into the texts: training and evaluation add them.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

from clpl_moe.common.text_key import text_key
from clpl_moe.mine.rank import MiningQuery
from clpl_moe.mine.select import NegativeMiner, Negatives
from clpl_moe.retrieval.collection import Collection

_MANY = 3  # positives, from which on queries are counted together


def training_lines(miner: NegativeMiner, collection: Collection, most: int) -> Iterator[dict[str, Any]]:
    """The training lines of a collection's queries, one at a time; the miner's counts tell what was taken, and what not.

    For a negative ``most`` queries are written, drawn from more that it is known to answer.
    """
    index, counts = miner.index, miner.counts
    counts["queries"] += len(collection.queries)
    counts["passages kept out: reserved to another split"] += index.reserved
    counts["passages kept out: empty or same text as another"] += index.repeated
    own = index.themselves()
    queries = []
    for query_id, text in zip(collection.query_ids, collection.queries):
        relevant = index.relevant(collection.qrels.get(query_id, {}))
        if not relevant:
            counts["queries dropped: no relevant passage in the corpus"] += 1
            continue
        excluded = index.answering(text) | own.get(text_key(text), set())
        if (itself := index.find(text)) is not None:
            excluded.add(itself)
        counts["passages left out: known to answer the query, besides its positives"] += len(excluded) - len(relevant)
        queries.append(MiningQuery(query_id, text, relevant, excluded))
    if not queries:
        return
    several = any(len(query.positives) > 1 for query in queries)
    by_positives = {number: Counter[str]() for number in sorted({len(query.positives) for query in queries})}
    for query, negatives in zip(queries, miner.mine(queries), strict=True):
        if several:
            _count_by_positives(query, negatives, by_positives[len(query.positives)])
        if not negatives.places:
            counts["queries dropped: no passage was left"] += 1
            continue
        draw = random.Random(f"{miner.seed} {query.key} queries")
        negative_queries = [_draw_some(index.negative_queries(place), most, draw) for place in negatives.places]
        scores: dict[str, list[float]] = {}
        if negatives.scores is not None and negatives.positive_scores is not None:
            highest = max(negatives.positive_scores)
            scores = {"pos_scores": negatives.positive_scores, "neg_scores": negatives.scores}
            if negatives.guide_scores is not None and negatives.positive_guide_scores is not None:
                scores["pos_guide_scores"] = negatives.positive_guide_scores
                scores["neg_guide_scores"] = negatives.guide_scores
            counts["negatives more similar than every positive"] += sum(score > highest for score in negatives.scores)
        counts["lines"] += 1
        counts["negatives"] += len(negatives.places)
        counts["negatives with known queries"] += sum(map(bool, negative_queries))
        counts["known queries of negatives"] += sum(map(len, negative_queries))
        counts["queries with fewer negatives than asked for"] += len(negatives.places) < miner.selection.negatives
        yield {
            "query": query.text,
            "pos": [index.texts[place] for place in query.positives],
            "neg": [index.texts[place] for place in negatives.places],
            "neg_q": [queries or None for queries in negative_queries],
            **{name: [round(score, 6) for score in values] for name, values in scores.items()},
            "query_id": query.key,
            "pos_ids": [index.passage_id(place) for place in query.positives],
            "neg_ids": [index.passage_id(place) for place in negatives.places],
        }
    for found in by_positives.values():  # so that those of fewer come first
        counts.update(found)


def _count_by_positives(query: MiningQuery, negatives: Negatives, counts: Counter[str]) -> None:
    """What the limits left to queries of one positive, and to those of several: ``positive_score`` moves the latter."""
    number = len(query.positives)
    kind = "1 positive" if number == 1 else f"{number} positives" if number < _MANY else f"{_MANY} positives or more"
    counts[f"queries of {kind}"] += 1
    counts[f"queries of {kind}: negatives"] += len(negatives.places)
    counts[f"queries of {kind}: passages left out, nearly as similar"] += negatives.too_similar
    counts[f"queries of {kind}: no passage was left"] += not negatives.places


def _draw_some(queries: list[str], most: int, draw: random.Random) -> list[str]:
    if len(queries) <= most:
        return queries
    return [queries[i] for i in sorted(draw.sample(range(len(queries)), most))]
