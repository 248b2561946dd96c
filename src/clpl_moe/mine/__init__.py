"""``python -m clpl_moe.mine``: training triplets with hard negatives and the queries that these do answer.

For each query of a split:

1. Passages of equal text (but for case, punctuation and white space) count as one, empty ones not at all, nor those that
   the corpus reserves to another split (``split``).
2. Negatives are taken from what the encoder ranks high, as :mod:`clpl_moe.mine.select` says. What is known to answer
   the query is none: its relevant passages, and passages that have the same question among their known queries.
3. Each negative brings the queries that it is known to answer (of the judgements and of
   ``positive_queries.jsonl``), or null.

A line has FlagEmbedding's fields ``query``, ``pos``, ``neg``, ``pos_scores`` and ``neg_scores`` (cosines, or the reranker's
scores), the penalty's ``neg_q``, and the ids: ``query_id``, ``pos_ids``, ``neg_ids`` (of equal passages the first).
Prompts are not written into the texts: training and evaluation add them.

Embeddings of passages are kept beside the output until that is written: the same command goes on after an interruption.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clpl_moe.common.errors import UserError
from clpl_moe.mine.index import PassageIndex
from clpl_moe.mine.select import MiningQuery, SelectionArguments, mine_negatives
from clpl_moe.retrieval.collection import Collection
from clpl_moe.retrieval.options import Encoder, EncodingArguments

if TYPE_CHECKING:
    from clpl_moe.mine.rerank import Reranker


@dataclass
class MineArguments:
    """What to mine from, and what to write."""

    model: str = field(metadata={"help": "model folder or hub name; normally the model that is to be trained"})
    collection: str = field(metadata={"help": "folder that holds a collection per language"})
    language: str = field(metadata={"help": "language: the folder in it"})
    output: str = field(metadata={"help": "JSONL file to write"})
    split: str = field(default="train", metadata={"help": "which queries and judgements"})
    max_positive_queries: int = field(
        default=4,
        metadata={"help": "known queries written for a negative at most, drawn from more"},
    )
    reranker: str | None = field(
        default=None,
        metadata={
            "help": "cross encoder (folder or hub name) that scores passages up to rank_to anew; all limits go by its scores"
        },
    )
    reranker_max_len: int = field(default=512, metadata={"help": "longest pair in tokens; the rest is cut off"})
    reranker_batch_size: int = field(default=32, metadata={"help": "pairs that the reranker takes at once"})
    seed: int = field(default=42, metadata={"help": "decides every draw"})
    overwrite: bool = field(default=False, metadata={"help": "replace the output file"})

    def __post_init__(self) -> None:
        for name, least in (("max_positive_queries", 0), ("reranker_max_len", 8), ("reranker_batch_size", 1)):
            if (value := getattr(self, name)) < least:
                raise UserError(f"--{name}: found {value}, expected at least {least}")


def mine(
    encoder: Encoder | None,
    collection: Collection,
    index: PassageIndex,
    arguments: MineArguments,
    selection: SelectionArguments,
    encoding: EncodingArguments,
    counts: Counter[str],
    *,
    reranker: Reranker | None = None,
    cache: Path | None = None,
    progress: bool = True,
) -> Iterator[dict[str, Any]]:
    """The training lines of a collection's queries, one at a time.

    Args:
        encoder: ranks the passages; None with ``sampling: corpus``, which does not.
        collection: queries and judgements.
        index: of the collection.
        arguments: how many known queries of a negative are written, and the seed.
        selection: which passages to take.
        encoding: lengths and batch size.
        counts: counts what was taken, and what was not and why.
        reranker: scores the window anew.
        cache: folder for embeddings of passages and the reranker's scores, from which an interrupted run goes on.
        progress: whether to show bars.
    """
    counts["queries"] += len(collection.queries)
    counts["passages kept out: reserved to another split"] += index.reserved
    counts["passages kept out: empty or same text as another"] += index.repeated
    own = index.places(set(collection.own_passages()))
    queries = []
    for query_id, text in zip(collection.query_ids, collection.queries):
        relevant = index.relevant(collection.qrels.get(query_id, {}))
        if not relevant:
            counts["queries dropped: no relevant passage in the corpus"] += 1
            continue
        excluded = index.answering(text) | ({own[query_id]} if query_id in own else set())
        counts["passages left out: known to answer the query, besides its positives"] += len(excluded) - len(relevant)
        queries.append(MiningQuery(query_id, text, relevant, excluded))
    if not queries:
        return
    found = mine_negatives(
        queries,
        index,
        selection,
        encoder=encoder,
        encoding=encoding,
        seed=arguments.seed,
        counts=counts,
        reranker=reranker,
        cache=cache,
        progress=progress,
    )
    for query, mined in zip(queries, found, strict=True):
        if not mined.places:
            counts["queries dropped: no passage was left"] += 1
            continue
        draw = random.Random(f"{arguments.seed} {query.key} queries")
        negative_queries = [
            _draw_queries(index.negative_queries(place), arguments.max_positive_queries, draw) for place in mined.places
        ]
        scores = {}
        if mined.scores is not None:
            scores = {"pos_scores": mined.positive_scores, "neg_scores": mined.scores}
            counts["negatives more similar than every positive"] += sum(
                score > max(mined.positive_scores) for score in mined.scores
            )
        counts["lines"] += 1
        counts["negatives"] += len(mined.places)
        counts["negatives with known queries"] += sum(map(bool, negative_queries))
        counts["known queries of negatives"] += sum(map(len, negative_queries))
        counts["queries with fewer negatives than asked for"] += len(mined.places) < selection.negatives
        yield {
            "query": query.text,
            "pos": [index.texts[place] for place in query.positives],
            "neg": [index.texts[place] for place in mined.places],
            "neg_q": [queries or None for queries in negative_queries],
            **{name: [round(score, 6) for score in values] for name, values in scores.items()},
            "query_id": query.key,
            "pos_ids": [index.passage_id(place) for place in query.positives],
            "neg_ids": [index.passage_id(place) for place in mined.places],
        }


def _draw_queries(queries: list[str], most: int, draw: random.Random) -> list[str]:
    """Up to ``most`` of the queries, in their order."""
    if len(queries) <= most:
        return queries
    return [queries[i] for i in sorted(draw.sample(range(len(queries)), most))]
