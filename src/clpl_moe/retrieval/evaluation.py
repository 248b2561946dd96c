"""Evaluate an encoder on a collection: encode, search, score. The command and training share it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from clpl_moe.errors import UserError
from clpl_moe.retrieval.collection import Collection
from clpl_moe.retrieval.encode import encode
from clpl_moe.retrieval.metrics import DEFAULT_METRICS, check_metrics, evaluate_run
from clpl_moe.retrieval.search import search

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from clpl_moe.encoder.settings import EmbeddingSettings


@dataclass
class RetrievalResult:
    """What an encoder retrieved from a collection, and how good it is.

    Attributes:
        metrics: metric -> mean over the judged queries.
        per_query: query id -> metric -> value, for each judged query.
        run: query id -> passage id -> score, best first, for each query of the collection.
        seconds: time spent, by step: ``encode_passages``, ``encode_queries``, ``search``, ``score``.
    """

    metrics: dict[str, float]
    per_query: dict[str, dict[str, float]] = field(repr=False)
    run: dict[str, dict[str, float]] = field(repr=False)
    seconds: dict[str, float] = field(default_factory=dict, repr=False)


def evaluate_retrieval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    collection: Collection,
    *,
    settings: EmbeddingSettings,
    query_max_len: int = 128,
    passage_max_len: int = 512,
    top_k: int = 1000,
    batch_tokens: int | None = None,
    metrics: Sequence[str] = DEFAULT_METRICS,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> RetrievalResult:
    """Rank a collection's passages for each of its queries by similarity, exactly, and score the ranking.

    Args:
        model: the encoder, on the device that is to compute.
        tokenizer: the encoder's.
        collection: passages, queries and judgements.
        settings: pooling, normalisation and prompts.
        query_max_len: longest query in tokens.
        passage_max_len: longest passage in tokens.
        top_k: passages kept for each query (all, where the corpus has fewer).
        batch_tokens: tokens a batch, None for what suits the device.
        metrics: names in the spelling of ``ir_measures``.
        dtype: precision of the encoder, as :func:`clpl_moe.retrieval.encode.encode` takes it.
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

    how = {"settings": settings, "batch_tokens": batch_tokens, "dtype": dtype, "progress": progress}
    queries = encode(model, tokenizer, collection.queries, kind="query", max_length=query_max_len, **how)
    check_finite(queries)
    clock("encode_queries")
    passages = encode(model, tokenizer, collection.passages, kind="passage", max_length=passage_max_len, **how)
    check_finite(passages)
    clock("encode_passages")
    scores, indices = search(queries.to(model.device), passages, top_k)
    ids = collection.passage_ids
    run = {
        query_id: {ids[i]: score for i, score in zip(row_indices, row_scores)}
        for query_id, row_indices, row_scores in zip(collection.query_ids, indices.tolist(), scores.tolist())
    }
    clock("search")
    means, per_query = evaluate_run(collection.qrels, run, metrics)
    clock("score")
    return RetrievalResult(means, per_query, run, seconds)


def check_finite(embeddings: torch.Tensor) -> None:
    """Raise :class:`UserError` where an encoder gave NaN or infinite values: a ranking by them is noise."""
    if broken := int((~torch.isfinite(embeddings).all(dim=1)).sum()):
        raise UserError(
            f"the encoder gives NaN or infinite embeddings ({broken} of {len(embeddings)} texts): its"
            " weights are broken, or the precision is too low for them (try float32)"
        )
