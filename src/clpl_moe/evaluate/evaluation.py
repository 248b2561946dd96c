"""Evaluate an encoder on a collection: encode, search, score. Training calls it, and the command with its tasks."""

from __future__ import annotations

import itertools
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clpl_moe import __version__
from clpl_moe.common.files import write_json
from clpl_moe.common.output import Output
from clpl_moe.encoder.weights import resolved_revision
from clpl_moe.evaluate import m3
from clpl_moe.evaluate import metrics as scoring
from clpl_moe.evaluate.tasks import QRELS_FILE, Task
from clpl_moe.retrieval.approximate import ApproximateIndex
from clpl_moe.retrieval.collection import Collection
from clpl_moe.retrieval.nearest import nearest, share_search
from clpl_moe.retrieval.quantize import QuantizedPassages
from clpl_moe.retrieval.search import search
from clpl_moe.retrieval.store import EmbeddingShards, cache_folder, encode_passages, encode_queries, process

if TYPE_CHECKING:
    from torch import Tensor

    from clpl_moe.encoder import Encoder
    from clpl_moe.evaluate.options import EvaluateArguments
    from clpl_moe.retrieval.options import EncodingArguments


@dataclass
class RetrievalResult:
    """What an encoder retrieved from a collection, and how good it is."""

    metrics: dict[str, float]  # means over the judged queries
    per_query: dict[str, dict[str, float]] = field(repr=False)  # of each judged query: metric -> value
    run: dict[str, dict[str, float]] = field(repr=False)  # of each query: passage id -> score, best first
    seconds: dict[str, float] = field(repr=False)  # encode_passages, encode_queries, search, score
    encoded: int  # passages encoded by this process; others were found on disk or are another's
    exact_metrics: dict[str, float] | None = None  # of an exact search, where the search was on quantized embeddings
    searched_bytes: int | None = None  # of the quantized embeddings
    approximate: dict[str, Any] | None = None  # figures of a search in an approximate index


def evaluate_retrieval(
    encoder: Encoder,
    collection: Collection,
    encoding: EncodingArguments,
    *,
    top_k: int = 1000,
    metrics: Sequence[str] = scoring.DEFAULT_METRICS,
    cache: Path | None = None,
    progress: bool = True,
    jointly: bool = False,
) -> RetrievalResult:
    """Rank a collection's passages for each of its queries by similarity, and score the ranking.

    The search is exact unless ``encoding`` has ``quantize``, where an exact one is made and scored, too, or an approximate
    ``index``. ``jointly``: the other processes call :func:`clpl_moe.retrieval.nearest.share_search` meanwhile. As in BEIR, a query does
    not find itself (:meth:`~clpl_moe.retrieval.collection.Collection.own_passages`). Of ``encoding``, lengths, batch size and
    search count; precision and settings are the encoder's. ``top_k`` passages are kept for each query. ``metrics`` are named as
    in ``ir_measures``. ``cache`` is a folder for the passages' embeddings, as
    :func:`clpl_moe.retrieval.store.encode_passages` takes it.

    Raises:
        UserError: an unknown metric, a length that the encoder cannot take, embeddings that are not finite.
    """
    scoring.check_metrics(metrics)  # an unknown metric shows before the corpus is encoded
    times = [time.perf_counter()]
    queries = encode_queries(encoder, collection.queries, encoding, progress=progress)
    times.append(time.perf_counter())
    passages = encode_passages(encoder, collection.passages, encoding, cache=cache, progress=progress)
    times.append(time.perf_counter())
    own, queries, quantized = collection.own_passages(), queries.to(encoder.device), None
    approximate = None
    depth = top_k + bool(own)
    if encoding.index == "approximate":
        index = ApproximateIndex(passages, encoding)
        run = _run(collection, own, top_k, *index.search(queries, depth))
        approximate = index.about
    elif encoding.quantize is None:
        run = _run(collection, own, top_k, *nearest(queries, passages, depth, encoding, jointly))
    else:
        quantized = QuantizedPassages(passages, encoding.quantize)
        run = _run(collection, own, top_k, *quantized.search(queries, depth, encoding.oversampling))
    times.append(time.perf_counter())
    means, per_query = scoring.evaluate_run(collection.qrels, run, metrics)
    times.append(time.perf_counter())
    steps = ("encode_queries", "encode_passages", "search", "score")
    seconds = {step: end - start for step, start, end in zip(steps, times, times[1:])}
    encoded = passages.encoded if isinstance(passages, EmbeddingShards) else len(passages)
    result = RetrievalResult(means, per_query, run, seconds, encoded, approximate=approximate)
    if quantized is not None:
        exact = _run(collection, own, top_k, *search(queries, passages, depth))
        result.exact_metrics = scoring.evaluate_run(collection.qrels, exact, metrics)[0]
        result.searched_bytes = quantized.codes.nbytes
    return result


def _run(
    collection: Collection, own: dict[str, int], top_k: int, scores: Tensor, indices: Tensor
) -> dict[str, dict[str, float]]:
    """Query id -> passage id -> score of the first ``top_k`` that are not the query itself (``own``)."""
    ids, run = collection.passage_ids, {}
    for query_id, row_indices, row_scores in zip(collection.query_ids, indices.tolist(), scores.tolist()):
        found = ((ids[i], score) for i, score in zip(row_indices, row_scores) if i != own.get(query_id))
        run[query_id] = dict(itertools.islice(found, top_k))
    return run


def rank_by_embeddings(
    task: Task, encoder: Encoder, arguments: EvaluateArguments, encoding: EncodingArguments, output: Output
) -> dict[str, Any] | None:
    """Do a task of the command; returns the content of its file of metrics, None in a process that does not write."""
    collection, folder = task.collection, task.folder
    with cache_folder(encoding, beside=output.embeddings) as cache:
        if process()[0] > 0:
            passages = encode_passages(encoder, collection.passages, encoding, cache=cache, progress=False)
            share_search(passages, encoding)
            return None
        print(
            f"{task.model} on {collection.language}: {len(collection.passages):,} passages"
            f" ({collection.titled:,} with a title),"
            f" {len(collection.queries):,} queries, {encoder.model.device.type}, {task.key['settings']['dtype']}",
            file=sys.stderr,
        )
        result = evaluate_retrieval(
            encoder, collection, encoding, top_k=arguments.top_k, metrics=arguments.metrics, cache=cache, jointly=True
        )
        content = {
            "metrics": result.metrics,
            **_describe(task, encoder, arguments, result.seconds),
            "passages_per_second": round(result.encoded / result.seconds["encode_passages"], 1),
        }
        if result.exact_metrics is not None:
            whole = 4 * len(collection.passages) * encoder.dimensions
            content |= {
                "exact_metrics": result.exact_metrics,
                "bytes": {encoding.quantize: result.searched_bytes, "float32": whole},
            }
        if result.approximate is not None:
            content["approximate"] = result.approximate
        with task.writing(output):
            scoring.write_trec_qrels(folder / QRELS_FILE, collection.qrels)
            scoring.write_trec_run(folder / scoring.run_file(scoring.DENSE), result.run, tag=Path(task.model).name)
            write_json(task.file, content)
    return content


def rerank_by_heads(
    task: Task, encoder: Encoder, arguments: EvaluateArguments, encoding: EncodingArguments, output: Output
) -> dict[str, Any] | None:
    """Do a task whose run of the embeddings is written; as :func:`rank_by_embeddings`."""
    if process()[0] > 0:  # the passages are few: the first process does it alone
        return None
    started = time.perf_counter()
    heads = m3.load_heads(task.model, encoder.model.config.hidden_size, revision=arguments.revisions[task.model])
    assert heads is not None  # the plan has looked
    dense = scoring.read_trec_run(task.folder / scoring.run_file(scoring.DENSE), task.collection)
    candidates = {query_id: list(scores)[: arguments.rerank_top] for query_id, scores in dense.items()}
    runs = m3.rerank(encoder, heads, task.collection, candidates, encoding, weights=arguments.m3_weights)
    qrels = task.collection.qrels
    content = {
        "metrics": {score: scoring.evaluate_run(qrels, run, arguments.metrics)[0] for score, run in runs.items()},
        **_describe(task, encoder, arguments, {"rerank": time.perf_counter() - started}),
    }
    with task.writing(output):
        for score, path in task.runs.items():
            scoring.write_trec_run(path, runs[score], tag=f"{Path(task.model).name}_{score}")
        write_json(task.file, content)
    return content


def _describe(task: Task, encoder: Encoder, arguments: EvaluateArguments, seconds: dict[str, float]) -> dict[str, Any]:
    return {
        **task.names,
        "revision": resolved_revision(task.model, revision=arguments.revisions[task.model]),
        "passages": len(task.collection.passages),
        "passages_with_title": task.collection.titled,
        "queries": len(task.collection.queries),
        "judged_queries": len(task.collection.qrels),
        **task.key,
        "seconds": {step: round(value, 3) for step, value in seconds.items()},
        "device": str(encoder.model.device),
        "versions": {
            "clpl_moe": __version__,
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "transformers", "ir_measures")},
        },
    }
