"""``python -m clpl_moe.evaluate``: retrieve from collections with one or more models, score what was found.

For each language ``OUTPUT/<language>/`` (with several models ``OUTPUT/<model>/<language>/``) gets ``run.trec``,
``qrels.trec`` and ``metrics.json``. Results belong to the content of the model, the collection and the settings, never to
a name: equal content is not computed again, other content in the same place is refused.

``--m3_scores true`` also ranks the first passages of each dense run by the sparse and multi-vector scores of BGE-M3's heads
(:mod:`clpl_moe.evaluate.m3`): ``run.<score>.trec`` for each kind of score, and ``metrics.m3.json``.

``OUTPUT/per_query.csv`` sets all models' values of each query side by side, and for several models
``OUTPUT/significance.json`` says of each pair whether their difference is more than chance
(:mod:`clpl_moe.evaluate.significance`).

The passages' embeddings lie on disk: an interrupted encoding goes on where it stopped, the search reads them in parts, and
under ``torchrun`` each process encodes its share.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clpl_moe import __version__
from clpl_moe.common.errors import UserError, at
from clpl_moe.common.files import atomic_open, refuse_unwritable, write_json
from clpl_moe.evaluate.metrics import (
    DENSE,
    EVALUATION_METRICS,
    M3_SCORES,
    M3_WEIGHTS,
    check_metrics,
    evaluate_run,
    read_trec_run,
    run_file,
    write_trec_qrels,
    write_trec_run,
)
from clpl_moe.evaluate.significance import RESAMPLES, compare
from clpl_moe.retrieval.collection import Collection
from clpl_moe.retrieval.options import EncodingArguments, open_encoder

if TYPE_CHECKING:
    from clpl_moe.evaluate.m3 import M3Heads
    from clpl_moe.retrieval.options import Encoder


_MAIN_METRIC = "nDCG@10"  # of MIRACL
METRICS_FILE = "metrics.json"
M3_FILE = "metrics.m3.json"
TABLE_FILE = "per_query.csv"
SIGNIFICANCE_FILE = "significance.json"
_TEST = (
    f"two-sided paired randomisation test over the queries ({RESAMPLES:,} random sign patterns, or all where they are no"
    " more), p_holm: Holm's correction over the pairs of a language, score and metric"
)
# query id -> metric -> value
_PerQuery = Mapping[str, Mapping[str, float]]


@dataclass
class EvaluateArguments:
    """What to evaluate on what."""

    model: list[str] = field(metadata={"help": "model folders or hub names; several give one table"})
    collection: str = field(metadata={"help": "folder that holds a collection per language"})
    languages: list[str] = field(metadata={"help": "languages: the folders in it"})
    output: str = field(
        metadata={
            "help": "folder for results. A folder per language (of several models: per model and language) holds run.trec"
            " (what was found), qrels.trec (the judgements) and metrics.json (metrics, and what they belong to); with"
            " --m3_scores also run.KIND.trec for each kind of score and metrics.m3.json. Beside them stand per_query.csv"
            " (language, query id, text and each model's metrics of each query) and, for several models,"
            " significance.json (each pair compared)"
        }
    )
    split: str = field(default="dev", metadata={"help": "which queries and judgements"})
    metrics: list[str] = field(
        default_factory=lambda: list(EVALUATION_METRICS),
        metadata={"help": "metrics, in the spelling of ir_measures; RR is the reciprocal rank (MRR), AP is MAP"},
    )
    top_k: int = field(default=1000, metadata={"help": "passages retrieved for each query"})
    compare_metric: list[str] | None = field(
        default=None,
        metadata={
            "help": "metrics by which each pair of models is compared: a two-sided paired randomisation test over the"
            " queries, with Holm's correction for the number of pairs, for each language; not given: nDCG@10, or the"
            " first of --metrics where that lacks it"
        },
    )
    m3_scores: bool = field(
        default=False,
        metadata={
            "help": "rank the first passages of the dense run by the scores of BGE-M3's heads, too: sparse, multi-vec,"
            " dense+sparse and all (their weighted means); a model without sparse_linear.pt and colbert_linear.pt gets its dense results only"
        },
    )
    rerank_top: int = field(default=200, metadata={"help": "with --m3_scores: how many passages of the dense run"})
    m3_weights: list[float] = field(
        default_factory=lambda: list(M3_WEIGHTS),
        metadata={"help": "with --m3_scores: weights of the dense, sparse and multi-vec score in the sums"},
    )
    overwrite: bool = field(default=False, metadata={"help": "replace results of another model, data or settings"})

    def __post_init__(self) -> None:
        for name in ("top_k", "rerank_top"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}: found {getattr(self, name)}, expected at least 1")
        weights = self.m3_weights
        if len(weights) != 3 or not all(0 <= weight < float("inf") for weight in weights) or sum(weights[:2]) == 0:
            found = " ".join(map(str, weights))
            raise UserError(f"--m3_weights: found {found}, expected three from 0 on, of dense or sparse one above 0")
        if self.compare_metric is None:
            self.compare_metric = [_MAIN_METRIC if _MAIN_METRIC in self.metrics else self.metrics[0]]
        for name in self.compare_metric:
            if name not in self.metrics:
                raise UserError(
                    f"--compare_metric: found {name}, expected some of --metrics: {', '.join(self.metrics)}"
                )


@dataclass
class Evaluation:
    """What :func:`evaluate` found.

    Attributes:
        results: for each model, language and kind of score its metrics and where they come from, as in the files
            ``metrics.json`` and ``metrics.m3.json``; models outermost.
        comparisons: for each language, kind of score, metric and pair of models a
            :class:`clpl_moe.evaluate.significance.Comparison` as a dictionary, as in ``significance.json``.
    """

    results: list[dict[str, Any]]
    comparisons: list[dict[str, Any]]


@dataclass
class _Task:
    """One model on one collection: where its results go, and what they depend on."""

    name: str
    collection: Collection
    folder: Path
    key: dict[str, Any]
    m3_key: dict[str, Any] | None  # None: no scores of heads


def evaluate(arguments: EvaluateArguments, encoding: EncodingArguments) -> Evaluation:
    """Evaluate every model on every language, and compare the models.

    Everything that can be refused is refused before anything is encoded. Of several processes
    (:func:`clpl_moe.retrieval.store.processes`) the first one writes; the others encode their part, and return nothing.

    Raises:
        UserError: a fault in a collection, no such model or metric, results of something else in the way.
    """
    from clpl_moe.retrieval.store import process

    check_metrics(arguments.metrics)
    collections = {
        language: Collection.load(arguments.collection, language, arguments.split)
        for language in dict.fromkeys(arguments.languages)
    }
    models = _distinct(arguments.model)
    labels = dict(zip(models, model_labels(models)))
    output = Path(arguments.output)
    encoder = None
    planned: list[_Task] = []
    for name in models:
        encoder = open_encoder(name, encoding)
        folder = output / labels[name] if len(models) > 1 else output
        planned += _plan(name, encoder, collections, folder, arguments, encoding)
    if arguments.m3_scores and all(task.m3_key is None for task in planned):
        raise UserError("--m3_scores: no model has sparse and multi-vector heads (sparse_linear.pt, colbert_linear.pt)")
    _refuse_other_table(output / TABLE_FILE)
    opened = models[-1]
    results: list[dict[str, Any]] = []
    per_query: list[_PerQuery] = []  # of each of the results
    for task in planned:
        steps = [(METRICS_FILE, (DENSE,), task.key, _evaluate_dense)]
        if task.m3_key is not None:
            steps.append((M3_FILE, M3_SCORES, task.m3_key, _evaluate_heads))
        for file, scores, key, compute in steps:
            runs = {score: task.folder / run_file(score) for score in scores}
            found = None
            if not arguments.overwrite and all(path.is_file() for path in runs.values()):
                found = _read(task.folder / file)
            if found is not None:
                if process()[0] == 0:
                    print(f"{task.folder / file}: the same model, collection and settings; not computed again")
            else:
                if opened != task.name:  # one model at a time in memory
                    encoder = None
                    encoder, opened = open_encoder(task.name, encoding), task.name
                found = compute(task, encoder, key, arguments, encoding)
            if process()[0] > 0:  # not the one that writes
                continue
            for score, path in runs.items():
                metrics = found["metrics"] if score == DENSE else found["metrics"][score]
                # Model and collection may lie elsewhere now.
                results.append({**found, **_names(task), "metrics": metrics, "score": score})
                per_query.append(evaluate_run(task.collection.qrels, read_trec_run(path), arguments.metrics)[1])
    if process()[0] > 0:
        return Evaluation([], [])
    _write_table(output / TABLE_FILE, collections, labels, results, per_query, arguments.metrics)
    comparisons = _compare(labels, results, per_query, arguments.compare_metric)
    if len(models) > 1:
        write_json(output / SIGNIFICANCE_FILE, {"test": _TEST, "comparisons": comparisons})
    else:
        (output / SIGNIFICANCE_FILE).unlink(missing_ok=True)
    return Evaluation(results, comparisons)


def _plan(
    name: str,
    encoder: Encoder,
    collections: dict[str, Collection],
    folder: Path,
    arguments: EvaluateArguments,
    encoding: EncodingArguments,
) -> list[_Task]:
    """What is to be done with one model; refuses where other results are in the way."""
    from clpl_moe.retrieval.encode import check_lengths, model_fingerprint

    check_lengths(encoder.model, encoding.query_max_len, encoding.passage_max_len, name)
    weights = model_fingerprint(encoder.model, encoder.tokenizer)
    heads = _heads(name, encoder) if arguments.m3_scores else None
    planned = []
    for language, collection in collections.items():
        key = {
            "model_hash": weights,
            "collection_hash": collection.fingerprint(),
            "settings": {
                **encoder.describe(encoding),
                "top_k": arguments.top_k,
                "metrics": list(arguments.metrics),
            },
        }
        m3_key = None
        if heads is not None:
            m3_settings = {"rerank_top": arguments.rerank_top, "m3_weights": arguments.m3_weights}
            m3_key = {**key, "heads_hash": heads.fingerprint(), "settings": {**key["settings"], **m3_settings}}
        place = folder / language
        refuse_unwritable(place / METRICS_FILE)
        if not arguments.overwrite:
            _refuse_other(place, METRICS_FILE, key)
            if m3_key is not None:
                _refuse_other(place, M3_FILE, m3_key)
        planned.append(_Task(name, collection, place, key, m3_key))
    return planned


def _heads(name: str, encoder: Encoder) -> M3Heads | None:
    from clpl_moe.evaluate.m3 import load_heads
    from clpl_moe.retrieval.store import process

    heads = load_heads(name, encoder.model.config.hidden_size)
    if heads is None and process()[0] == 0:
        print(f"{name}: no sparse_linear.pt and colbert_linear.pt; it is evaluated by its dense embeddings only")
    return heads


def _refuse_other(folder: Path, file: str, key: dict[str, Any]) -> None:
    """Refuse results of something else. The file of the dense ones vouches for all run files of its folder: those of heads
    without a file of their own are what a killed command left."""
    asked = "name another --output, or pass --overwrite true to replace it"
    if (folder / file).exists():
        found = _read(folder / file) or {}
        if differing := [name for name in key if found.get(name) != key[name]]:
            raise UserError(
                f"{at(folder / file)}: holds results of something else (other {', '.join(differing)}); {asked}"
            )
        return
    runs = [folder / run_file(kind) for kind in (DENSE, *M3_SCORES)] if file == METRICS_FILE else []
    if in_the_way := [path for path in runs if path.exists()]:
        raise UserError(f"{at(in_the_way[0])}: a run file without {file} is in the way; {asked}")


def _evaluate_dense(
    task: _Task,
    encoder: Encoder,
    key: dict[str, Any],
    arguments: EvaluateArguments,
    encoding: EncodingArguments,
) -> dict[str, Any]:
    from clpl_moe.evaluate.evaluation import evaluate_retrieval
    from clpl_moe.retrieval.store import cache_folder, encode_passages, process

    collection, folder = task.collection, task.folder
    with cache_folder(encoding, beside=folder / ".embeddings") as cache:
        if process()[0] > 0:  # not the one that writes
            encode_passages(encoder, collection.passages, encoding, cache=cache, progress=False)
            return {}
        print(
            f"{task.name} on {collection.language}: {len(collection.passages):,} passages,"
            f" {len(collection.queries):,} queries, {encoder.model.device.type}, {key['settings']['dtype']}"
        )
        result = evaluate_retrieval(
            encoder.model,
            encoder.tokenizer,
            collection,
            settings=encoder.settings,
            query_max_len=encoding.query_max_len,
            passage_max_len=encoding.passage_max_len,
            top_k=arguments.top_k,
            batch_tokens=encoding.batch_tokens,
            metrics=arguments.metrics,
            dtype=encoder.dtype,
            cache=cache,
        )
        content = {
            "metrics": result.metrics,
            **_describe(task, encoder, key, result.seconds),
            "passages_per_second": round(result.encoded / result.seconds["encode_passages"], 1),
        }
        # metrics.json vouches for the run file beside it: it goes first and comes last. What was ranked again goes with it.
        for file in (METRICS_FILE, M3_FILE, *map(run_file, M3_SCORES)):
            (folder / file).unlink(missing_ok=True)
        write_trec_qrels(folder / "qrels.trec", collection.qrels)
        write_trec_run(folder / run_file(DENSE), result.run, tag=Path(task.name).name)
        write_json(folder / METRICS_FILE, content)
    return content


def _evaluate_heads(
    task: _Task,
    encoder: Encoder,
    key: dict[str, Any],
    arguments: EvaluateArguments,
    encoding: EncodingArguments,
) -> dict[str, Any]:
    from clpl_moe.evaluate.m3 import load_heads, rerank
    from clpl_moe.retrieval.store import process

    if process()[0] > 0:  # the passages are few: the first one does it alone
        return {}
    started = time.perf_counter()
    heads = load_heads(task.name, encoder.model.config.hidden_size)
    dense = read_trec_run(task.folder / run_file(DENSE))
    candidates = {query_id: list(scores)[: arguments.rerank_top] for query_id, scores in dense.items()}
    runs = rerank(encoder, heads, task.collection, candidates, encoding, weights=arguments.m3_weights)
    qrels = task.collection.qrels
    content = {
        "metrics": {score: evaluate_run(qrels, run, arguments.metrics)[0] for score, run in runs.items()},
        **_describe(task, encoder, key, {"rerank": time.perf_counter() - started}),
    }
    (task.folder / M3_FILE).unlink(missing_ok=True)
    for score, run in runs.items():
        write_trec_run(task.folder / run_file(score), run, tag=f"{Path(task.name).name}_{score}")
    write_json(task.folder / M3_FILE, content)
    return content


def _names(task: _Task) -> dict[str, str]:
    collection = task.collection
    return {
        "model": task.name,
        "language": collection.language,
        "split": collection.split,
        "collection": str(collection.directory),
    }


def _describe(task: _Task, encoder: Encoder, key: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    collection = task.collection
    return {
        **_names(task),
        "passages": len(collection.passages),
        "queries": len(collection.queries),
        "judged_queries": len(collection.qrels),
        **key,
        "seconds": {step: round(value, 3) for step, value in seconds.items()},
        "device": str(encoder.model.device),
        "versions": {
            "clpl_moe": __version__,
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "transformers", "ir_measures")},
        },
    }


_TABLE_COLUMNS = ["language", "query_id", "query"]


def _refuse_other_table(path: Path) -> None:
    """Each call writes the table anew from the run files, so that nothing is lost; but only where it is a table of ours."""
    if path.exists():
        heading = f"{','.join(_TABLE_COLUMNS)},".encode()
        with path.open("rb") as file:
            if file.read(len(heading)) != heading:
                raise UserError(
                    f"{at(path)}: found another file, expected none or an earlier table; name another --output"
                )


def _write_table(
    path: Path,
    collections: Mapping[str, Collection],
    labels: Mapping[str, str],
    results: Sequence[dict[str, Any]],
    per_query: Sequence[_PerQuery],
    metrics: Sequence[str],
) -> None:
    """A row for each judged query, a column for each metric of each model (and kind of score)."""
    values: dict[str, dict[str, _PerQuery]] = {}  # language -> system -> values
    for result, own in zip(results, per_query, strict=True):
        values.setdefault(result["language"], {})[_system(labels, result)] = own
    systems = list(dict.fromkeys(_system(labels, result) for result in results))
    with atomic_open(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*_TABLE_COLUMNS, *(f"{name} {system}" for name in metrics for system in systems)])
        for language, collection in collections.items():
            own = values[language]
            for query_id, text in zip(collection.query_ids, collection.queries):
                if query_id in collection.qrels:
                    row = (own[system][query_id][name] for name in metrics for system in systems)
                    writer.writerow([language, query_id, text, *row])


def _compare(
    labels: Mapping[str, str],
    results: Sequence[dict[str, Any]],
    per_query: Sequence[_PerQuery],
    metrics: Sequence[str],
) -> list[dict[str, Any]]:
    """Every pair of models by each metric, in each language and kind of score that both have."""
    groups: dict[tuple[str, str], dict[str, _PerQuery]] = {}
    for result, own in zip(results, per_query, strict=True):
        groups.setdefault((result["language"], result["score"]), {})[labels[result["model"]]] = own
    return [
        {"language": language, "score": kind, "metric": metric, **dataclasses.asdict(comparison)}
        for (language, kind), systems in groups.items()
        for metric in metrics
        for comparison in compare({name: {q: v[metric] for q, v in own.items()} for name, own in systems.items()})
    ]


def _system(labels: Mapping[str, str], result: dict[str, Any]) -> str:
    label = labels[result["model"]]
    return label if result["score"] == DENSE else f"{label} {result['score']}"


def format_table(results: Sequence[dict[str, Any]]) -> str:
    """An aligned table: a row per model, kind of score and language, and the average over several languages."""
    names = list(results[0]["metrics"])
    models = list(dict.fromkeys(r["model"] for r in results))
    labels = dict(zip(models, model_labels(models)))
    several = any(r["score"] != DENSE for r in results)
    rows = [["model", *(["score"] if several else []), "language", "queries", *names]]
    for model, kind in dict.fromkeys((r["model"], r["score"]) for r in results):
        own = [r for r in results if (r["model"], r["score"]) == (model, kind)]
        first = [labels[model], *([kind] if several else [])]
        for result in own:
            values = [f"{result['metrics'][n]:.4f}" for n in names]
            rows.append([*first, result["language"], str(result["judged_queries"]), *values])
        if len(own) > 1:
            means = [f"{sum(r['metrics'][n] for r in own) / len(own):.4f}" for n in names]
            rows.append([*first, "average", "", *means])
    return _align(rows, left=3 if several else 2)


def format_comparisons(comparisons: Sequence[dict[str, Any]]) -> str:
    """An aligned table: a row per language, kind of score, metric and pair of models."""
    several = any(c["score"] != DENSE for c in comparisons)
    heading = ["second - first", *(["score"] if several else []), "language", "metric"]
    rows = [[*heading, "difference", "better", "worse", "p", "p (Holm)"]]
    for c in comparisons:
        first = [f"{c['second']} - {c['first']}", *([c["score"]] if several else []), c["language"], c["metric"]]
        numbers = [f"{c['difference']:+.4f}", str(c["better"]), str(c["worse"]), f"{c['p']:.4f}", f"{c['p_holm']:.4f}"]
        rows.append([*first, *numbers])
    return _align(rows, left=len(heading))


def _align(rows: Sequence[Sequence[str]], left: int) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        words = [w.ljust(n) if column < left else w.rjust(n) for column, (w, n) in enumerate(zip(row, widths))]
        lines.append("  ".join(words).rstrip())
    return "\n".join(lines)


def _distinct(models: Sequence[str]) -> list[str]:
    """The models without those that are the same folder spelled otherwise."""
    return list({_parts(name): name for name in reversed(models)}.values())[::-1]


def _parts(name: str) -> tuple[str, ...]:
    return Path(name).resolve().parts[1:] or ("root",) if Path(name).exists() else tuple(name.split("/"))


def model_labels(models: Sequence[str]) -> list[str]:
    """A short name for each model: the last part of its path, with as many before it as make all differ."""
    parts = [_parts(name) for name in models]
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["_".join(p[-depth:]) for p in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{label}_{number}" for number, label in enumerate(labels, 1)]


def _read(path: Path) -> dict[str, Any] | None:
    """A result's content; None where there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and isinstance(content.get("metrics"), dict) else None
