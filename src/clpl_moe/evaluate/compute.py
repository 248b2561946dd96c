"""One model on one collection: retrieve, score, and write run files, judgements and metrics."""

from __future__ import annotations

import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clpl_moe import __version__
from clpl_moe.common.files import write_json
from clpl_moe.evaluate.metrics import (
    DENSE,
    M3_SCORES,
    evaluate_run,
    read_trec_run,
    run_file,
    write_trec_qrels,
    write_trec_run,
)
from clpl_moe.evaluate.tasks import M3_FILE, METRICS_FILE, Task

if TYPE_CHECKING:
    from clpl_moe.encoder import Encoder
    from clpl_moe.evaluate.options import EvaluateArguments
    from clpl_moe.retrieval.options import EncodingArguments


def compute(
    task: Task, encoder: Encoder, arguments: EvaluateArguments, encoding: EncodingArguments
) -> dict[str, Any] | None:
    """Do a task; returns the content of its file of metrics, None in a process that does not write."""
    return (_rerank_by_heads if task.heads else _rank_by_embeddings)(task, encoder, arguments, encoding)


def _rank_by_embeddings(
    task: Task, encoder: Encoder, arguments: EvaluateArguments, encoding: EncodingArguments
) -> dict[str, Any] | None:
    from clpl_moe.evaluate.evaluation import evaluate_retrieval
    from clpl_moe.retrieval.store import cache_folder, encode_passages, process

    collection, folder = task.collection, task.folder
    with cache_folder(encoding, beside=folder / ".embeddings") as cache:
        if process()[0] > 0:
            encode_passages(encoder, collection.passages, encoding, cache=cache, progress=False)
            return None
        print(
            f"{task.model} on {collection.language}: {len(collection.passages):,} passages,"
            f" {len(collection.queries):,} queries, {encoder.model.device.type}, {task.key['settings']['dtype']}",
            file=sys.stderr,
        )
        result = evaluate_retrieval(
            encoder, collection, encoding, top_k=arguments.top_k, metrics=arguments.metrics, cache=cache
        )
        content = {
            "metrics": result.metrics,
            **_describe(task, encoder, result.seconds),
            "passages_per_second": round(result.encoded / result.seconds["encode_passages"], 1),
        }
        # metrics.json vouches for the run file beside it: removed first, written last. Scores of heads were of the old run.
        for file in (METRICS_FILE, M3_FILE, *map(run_file, M3_SCORES)):
            (folder / file).unlink(missing_ok=True)
        write_trec_qrels(folder / "qrels.trec", collection.qrels)
        write_trec_run(folder / run_file(DENSE), result.run, tag=Path(task.model).name)
        write_json(task.file, content)
    return content


def _rerank_by_heads(
    task: Task, encoder: Encoder, arguments: EvaluateArguments, encoding: EncodingArguments
) -> dict[str, Any] | None:
    from clpl_moe.evaluate.m3 import load_heads, rerank
    from clpl_moe.retrieval.store import process

    if process()[0] > 0:  # the passages are few: the first process does it alone
        return None
    started = time.perf_counter()
    heads = load_heads(task.model, encoder.model.config.hidden_size)
    assert heads is not None  # the plan has looked
    dense = read_trec_run(task.folder / run_file(DENSE))
    candidates = {query_id: list(scores)[: arguments.rerank_top] for query_id, scores in dense.items()}
    runs = rerank(encoder, heads, task.collection, candidates, encoding, weights=arguments.m3_weights)
    qrels = task.collection.qrels
    content = {
        "metrics": {score: evaluate_run(qrels, run, arguments.metrics)[0] for score, run in runs.items()},
        **_describe(task, encoder, {"rerank": time.perf_counter() - started}),
    }
    task.file.unlink(missing_ok=True)
    for score, path in task.runs.items():
        write_trec_run(path, runs[score], tag=f"{Path(task.model).name}_{score}")
    write_json(task.file, content)
    return content


def _describe(task: Task, encoder: Encoder, seconds: dict[str, float]) -> dict[str, Any]:
    return {
        **task.names,
        "passages": len(task.collection.passages),
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
