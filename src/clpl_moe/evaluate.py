"""``python -m clpl_moe.evaluate``: retrieve from collections with one or more models, score what was found.

For each language ``OUTPUT/<language>/`` (with several models ``OUTPUT/<model>/<language>/``) gets
``run.trec`` and ``metrics.json``. Results belong to the content of the model, the collection and the
settings, never to a name: equal content is not computed again, other content in the same place is refused.

The passages' embeddings lie on disk: an interrupted encoding goes on where it stopped, the search reads them in parts, and
under ``torchrun`` each process encodes its share.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clpl_moe import __version__
from clpl_moe.cli import parse
from clpl_moe.errors import UserError, at, command
from clpl_moe.files import refuse_unwritable, write_json
from clpl_moe.retrieval.collection import Collection
from clpl_moe.retrieval.metrics import DEFAULT_METRICS, check_metrics, write_trec_run
from clpl_moe.retrieval.options import EncodingArguments, open_encoder

if TYPE_CHECKING:
    from clpl_moe.retrieval.options import Encoder


@dataclass
class EvaluateArguments:
    """What to evaluate on what."""

    model: list[str] = field(metadata={"help": "model folders or hub names; several give one table"})
    collection: str = field(metadata={"help": "folder that holds a collection per language"})
    languages: list[str] = field(metadata={"help": "languages: the folders in it"})
    output: str = field(metadata={"help": "folder for the run files and metrics"})
    split: str = field(default="dev", metadata={"help": "which queries and judgements"})
    metrics: list[str] = field(
        default_factory=lambda: list(DEFAULT_METRICS),
        metadata={"help": "metrics, in the spelling of ir_measures"},
    )
    top_k: int = field(default=1000, metadata={"help": "passages retrieved for each query"})
    overwrite: bool = field(default=False, metadata={"help": "replace results of another model, data or settings"})

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise UserError(f"--top_k: found {self.top_k}, expected at least 1")


def evaluate(arguments: EvaluateArguments, encoding: EncodingArguments) -> list[dict[str, Any]]:
    """Evaluate every model on every language; returns the content of each ``metrics.json``, models outermost.

    Everything that can be refused is refused before anything is encoded. Of several processes
    (:func:`clpl_moe.retrieval.store.processes`) the first one writes; the others encode their part, and return nothing.

    Raises:
        UserError: a fault in a collection, no such model or metric, results of something else in the way.
    """
    from clpl_moe.retrieval.store import cache_folder, encode_passages, process

    check_metrics(arguments.metrics)
    collections = {
        language: Collection.load(arguments.collection, language, arguments.split)
        for language in dict.fromkeys(arguments.languages)
    }
    models = _distinct(arguments.model)
    folders = {
        name: Path(arguments.output, label) if len(models) > 1 else Path(arguments.output)
        for name, label in zip(models, _labels(models))
    }
    encoder = None
    planned: list[tuple[str, Collection, Path, dict[str, Any]]] = []
    for name in models:
        encoder = open_encoder(name, encoding)
        planned += _plan(name, encoder, collections, folders[name], arguments, encoding)
    opened = models[-1]
    results = []
    for name, collection, folder, key in planned:
        found = None if arguments.overwrite else _read(folder / "metrics.json")
        if found is not None:
            print(f"{folder}: holds the result of the same model, collection and settings; not computed again")
            results.append({**found, "model": name})  # it may lie elsewhere now
            continue
        if opened != name:  # one model at a time in memory
            encoder = None
            encoder, opened = open_encoder(name, encoding), name
        with cache_folder(encoding, beside=folder / ".embeddings") as cache:
            if process()[0] > 0:  # not the one that writes
                encode_passages(encoder, collection.passages, encoding, cache=cache, progress=False)
            else:
                results.append(_evaluate_one(name, encoder, collection, folder, key, arguments, encoding, cache))
    return results


def _plan(
    name: str,
    encoder: Encoder,
    collections: dict[str, Collection],
    folder: Path,
    arguments: EvaluateArguments,
    encoding: EncodingArguments,
) -> list[tuple[str, Collection, Path, dict[str, Any]]]:
    """What is to be done with one model; refuses where other results are in the way."""
    from clpl_moe.retrieval.encode import max_positions, model_fingerprint

    limit = max_positions(encoder.model)
    for option in ("query_max_len", "passage_max_len"):
        if limit is not None and getattr(encoding, option) > limit:
            raise UserError(f"--{option}: found {getattr(encoding, option)}, {name} takes {limit} tokens at most")
    weights = model_fingerprint(encoder.model, encoder.tokenizer)
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
        place = folder / language
        refuse_unwritable(place / "metrics.json")
        found = _read(place / "metrics.json")
        if not arguments.overwrite and (place / "metrics.json").exists():
            differing = [k for k in key if (found or {}).get(k) != key[k]]
            if differing:
                raise UserError(
                    f"{at(place / 'metrics.json')}: holds results of something else (other"
                    f" {', '.join(differing)}); name another --output, or pass --overwrite true to replace it"
                )
        elif not arguments.overwrite and (place / "run.trec").exists():
            raise UserError(
                f"{at(place / 'run.trec')}: a run file without metrics.json is in the way; name another"
                " --output, or pass --overwrite true to replace it"
            )
        planned.append((name, collection, place, key))
    return planned


def _evaluate_one(
    name: str,
    encoder: Encoder,
    collection: Collection,
    folder: Path,
    key: dict[str, Any],
    arguments: EvaluateArguments,
    encoding: EncodingArguments,
    cache: Path,
) -> dict[str, Any]:
    from clpl_moe.retrieval.evaluation import evaluate_retrieval

    print(
        f"{name} on {collection.language}: {len(collection.passages):,} passages,"
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
        "model": name,
        "language": collection.language,
        "split": collection.split,
        "collection": str(collection.directory),
        "passages": len(collection.passages),
        "queries": len(collection.queries),
        "judged_queries": len(collection.qrels),
        **key,
        "seconds": {step: round(seconds, 3) for step, seconds in result.seconds.items()},
        "passages_per_second": round(result.encoded / result.seconds["encode_passages"], 1),
        "device": str(encoder.model.device),
        "versions": {
            "clpl_moe": __version__,
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "transformers", "ir_measures")},
        },
    }
    # metrics.json vouches for the run file beside it: it goes first and comes last.
    (folder / "metrics.json").unlink(missing_ok=True)
    write_trec_run(folder / "run.trec", result.run, tag=Path(name).name)
    write_json(folder / "metrics.json", content)
    return content


def format_table(results: Sequence[dict[str, Any]]) -> str:
    """An aligned table: a row per model and language, and a model's average over several languages."""
    names = list(results[0]["metrics"])
    models = list(dict.fromkeys(r["model"] for r in results))
    labels = dict(zip(models, _labels(models)))
    rows = [["model", "language", "queries", *names]]
    for model in models:
        own = [r for r in results if r["model"] == model]
        for result in own:
            values = [f"{result['metrics'][n]:.4f}" for n in names]
            rows.append([labels[model], result["language"], str(result["judged_queries"]), *values])
        if len(own) > 1:
            means = [f"{sum(r['metrics'][n] for r in own) / len(own):.4f}" for n in names]
            rows.append([labels[model], "average", "", *means])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        words = [w.ljust(width) if column < 2 else w.rjust(width) for column, (w, width) in enumerate(zip(row, widths))]
        lines.append("  ".join(words).rstrip())
    return "\n".join(lines)


def _distinct(models: Sequence[str]) -> list[str]:
    """The models without those that are the same folder spelled otherwise."""
    return list({_parts(name): name for name in reversed(models)}.values())[::-1]


def _parts(name: str) -> tuple[str, ...]:
    return Path(name).resolve().parts[1:] if Path(name).exists() else tuple(name.split("/"))


def _labels(models: Sequence[str]) -> list[str]:
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


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    arguments, encoding = parse(
        [EvaluateArguments, EncodingArguments],
        prog="clpl_moe.evaluate",
        description="Retrieve from collections with one or more models; write run files and metrics.",
        argv=argv,
    )
    from clpl_moe.retrieval.store import processes

    with processes() as first:
        results = evaluate(arguments, encoding)
    if first:
        print(format_table(results))


if __name__ == "__main__":
    main()
