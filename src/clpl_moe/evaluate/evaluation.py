"""Evaluate an encoder on a collection: encode, search, score. The command and training call it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from clpl_moe.evaluate.metrics import DEFAULT_METRICS, check_metrics, evaluate_run
from clpl_moe.retrieval.collection import Collection
from clpl_moe.retrieval.search import search
from clpl_moe.retrieval.store import EmbeddingShards, encode_passages, encode_queries

if TYPE_CHECKING:
    from clpl_moe.encoder import Encoder
    from clpl_moe.retrieval.options import EncodingArguments


@dataclass
class RetrievalResult:
    """What an encoder retrieved from a collection, and how good it is.

    Attributes:
        metrics: metric -> mean over the judged queries.
        per_query: query id -> metric -> value, for each judged query.
        run: query id -> passage id -> score, best first, for each query of the collection.
        seconds: time spent, by step: ``encode_passages``, ``encode_queries``, ``search``, ``score``.
        encoded: how many passages were encoded by this process; others were found on disk or are another's.
    """

    metrics: dict[str, float]
    per_query: dict[str, dict[str, float]] = field(repr=False)
    run: dict[str, dict[str, float]] = field(repr=False)
    seconds: dict[str, float] = field(default_factory=dict, repr=False)
    encoded: int = 0


def evaluate_retrieval(
    encoder: Encoder,
    collection: Collection,
    encoding: EncodingArguments,
    *,
    top_k: int = 1000,
    metrics: Sequence[str] = DEFAULT_METRICS,
    cache: Path | None = None,
    progress: bool = True,
) -> RetrievalResult:
    """Rank a collection's passages for each of its queries by similarity, exactly, and score the ranking.

    As in BEIR, a query does not find itself (:meth:`~clpl_moe.retrieval.collection.Collection.own_passages`).

    Args:
        encoder: the encoder, on the device that is to compute.
        collection: passages, queries and judgements.
        encoding: lengths and batch size; precision and settings are the encoder's.
        top_k: passages kept for each query (all, where the corpus has fewer).
        metrics: names in the spelling of ``ir_measures``.
        cache: folder for the passages' embeddings, as :func:`clpl_moe.retrieval.store.encode_passages` takes it.
        progress: whether to show bars.

    Raises:
        UserError: an unknown metric, a length that the encoder cannot take, embeddings that are not finite.
    """
    check_metrics(metrics)  # an unknown metric shows before the corpus is encoded
    seconds: dict[str, float] = {}
    started = time.perf_counter()

    def clock(step: str) -> None:
        nonlocal started
        now = time.perf_counter()
        seconds[step], started = now - started, now

    queries = encode_queries(encoder, collection.queries, encoding, progress=progress)
    clock("encode_queries")
    passages = encode_passages(encoder, collection.passages, encoding, cache=cache, progress=progress)
    clock("encode_passages")
    own = collection.own_passages()
    scores, indices = search(queries.to(encoder.device), passages, top_k + bool(own))
    ids = collection.passage_ids
    run = {}
    for query_id, row_indices, row_scores in zip(collection.query_ids, indices.tolist(), scores.tolist()):
        found = ((ids[i], score) for i, score in zip(row_indices, row_scores) if i != own.get(query_id))
        run[query_id] = dict(itertools.islice(found, top_k))
    clock("search")
    means, per_query = evaluate_run(collection.qrels, run, metrics)
    clock("score")
    encoded = passages.encoded if isinstance(passages, EmbeddingShards) else len(passages)
    return RetrievalResult(means, per_query, run, seconds, encoded)
