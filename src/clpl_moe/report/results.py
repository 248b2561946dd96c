"""What a report is made of: the course of a run, and what was retrieved before and after it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clpl_moe.common.errors import UserError, at
from clpl_moe.evaluate.metrics import evaluate_run, read_trec_run
from clpl_moe.retrieval.collection import Collection
from clpl_moe.train.metrics_file import METRICS_FILE, read_metrics


@dataclass
class RunCourse:
    """A training run: its options (empty where the folder has none) and the records of its ``metrics.jsonl``."""

    name: str
    folder: Path
    options: dict[str, Any]
    records: list[dict[str, Any]] = field(repr=False)

    @classmethod
    def read(cls, folder: Path, name: str) -> RunCourse:
        """Read a run folder.

        Raises:
            UserError: it has no ``metrics.jsonl``, or that is broken.
        """
        from clpl_moe.common.cli import load_yaml

        config = folder / "train_config.yaml"
        options = load_yaml(config) if config.is_file() else {}
        return cls(name, folder, options, read_metrics(folder / METRICS_FILE))

    def series(self, name: str) -> list[tuple[float, float]]:
        """As :func:`series`."""
        return series(self.records, name)

    def expert_load(self) -> tuple[list[float], list[list[list[float]]]]:
        """Steps (S,), and shares (S, L, N) of layers and experts."""
        found = {r["step"]: r["expert_load"] for r in self.records if r.get("expert_load")}
        return list(found), list(found.values())

    def moe_layers(self, count: int) -> list[int]:
        """The numbers of the layers with experts, of which there are ``count``."""
        from clpl_moe.moe.config import MoEConfig

        try:
            config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
            layers = MoEConfig(**config["moe"]).resolve_layers(config["num_hidden_layers"])
        except (OSError, ValueError, KeyError, TypeError):
            layers = []
        return layers if len(layers) == count else list(range(count))


def series(records: Sequence[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """Step and value, by step, where both are there; of a step logged twice, the later."""
    values = {r["step"]: r[name] for r in records if _is_number(r.get("step")) and _is_number(r.get(name))}
    return sorted(values.items())


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass
class Hit:
    """A retrieved passage."""

    rank: int
    text: str
    relevant: bool


@dataclass
class QueryChange:
    """One query before and after: values of the metric, and the first passages retrieved."""

    id: str
    text: str
    before: float
    after: float
    relevant: list[str] = field(default_factory=list)
    hits_before: list[Hit] = field(default_factory=list)
    hits_after: list[Hit] = field(default_factory=list)

    @property
    def change(self) -> float:
        return self.after - self.before


@dataclass
class BeforeAfter:
    """A run's results on one language beside those of its base model.

    Attributes:
        queries: every judged query.
        gained: those that gained most, with texts and passages; ``lost`` likewise.
        passages: size of the corpus.
    """

    run: str
    language: str
    metric: str
    queries: list[QueryChange]
    gained: list[QueryChange]
    lost: list[QueryChange]
    passages: int

    def mean(self, when: str) -> float:
        """Of the metric over the queries, ``before`` or ``after``."""
        return sum(getattr(query, when) for query in self.queries) / len(self.queries)

    def counts(self) -> tuple[int, int, int]:
        """How many queries gained, lost, and stayed."""
        gained, lost = (sum(sign * q.change > 1e-9 for q in self.queries) for sign in (1, -1))
        return gained, lost, len(self.queries) - gained - lost


def languages_of(folder: Path) -> list[str]:
    """The languages of which a folder of ``clpl_moe.evaluate`` holds results."""
    return sorted(path.parent.name for path in folder.glob("*/run.trec"))


def compare_results(
    run: str,
    before: Path,
    after: Path,
    language: str,
    metric: str,
    *,
    collection: str | None = None,
    examples: int = 5,
    depth: int = 3,
) -> BeforeAfter:
    """Compare what two models retrieved.

    Args:
        run: name of the run.
        before: folder of the base model's results, as ``evaluate`` writes them, which holds a folder of ``language``.
        after: the same of the run's.
        language: whose results.
        metric: in the spelling of ``ir_measures``.
        collection: folder of the collections; None for the one that the results name.
        examples: how many queries of those that gained and lost most get their texts.
        depth: how many passages of each.

    Raises:
        UserError: results or collection are missing, or the results are of another collection.
    """
    about = [read_result(folder / language / "metrics.json") for folder in (before, after)]
    if about[0]["collection_hash"] != about[1]["collection_hash"]:
        raise UserError(
            f"{at(after / language)}: its results are of another collection than those of {before / language}"
        )
    loaded = Collection.load(collection or about[1]["collection"], language, about[1]["split"])
    if loaded.fingerprint() != about[1]["collection_hash"]:
        raise UserError(
            f"{at(loaded.directory / language)}: not the collection that {after / language} has results of, or changed since"
        )
    runs = [read_trec_run(folder / language / "run.trec") for folder in (before, after)]
    values = [evaluate_run(loaded.qrels, found, [metric])[1] for found in runs]
    texts = dict(zip(loaded.query_ids, loaded.queries))
    queries = [QueryChange(q, texts[q], values[0][q][metric], values[1][q][metric]) for q in loaded.qrels]
    ordered = sorted(queries, key=lambda query: (query.change, query.id))
    lost = [query for query in ordered[:examples] if query.change < -1e-9]
    gained = [query for query in ordered[::-1][:examples] if query.change > 1e-9]
    _add_passages([*gained, *lost], loaded, runs, depth)
    return BeforeAfter(run, language, metric, queries, gained, lost, len(loaded.passages))


def read_result(path: Path) -> dict[str, Any]:
    """What a ``metrics.json`` of ``clpl_moe.evaluate`` says of results: collection and its hash, split, metrics.

    Raises:
        UserError: there is no such file, or it is another one.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {name: content[name] for name in ("collection", "collection_hash", "split", "metrics")}
    except OSError:
        raise UserError(f"{at(path)}: no such file; expected results of clpl_moe.evaluate") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{at(path)}: not the results of clpl_moe.evaluate") from None


def _add_passages(
    queries: Sequence[QueryChange], collection: Collection, runs: Sequence[dict[str, dict[str, float]]], depth: int
) -> None:
    """Put the passages' texts into the queries; only those are read."""
    top = [{query.id: list(run.get(query.id, {}))[:depth] for query in queries} for run in runs]
    relevant = {q.id: [p for p, grade in collection.qrels[q.id].items() if grade > 0] for q in queries}
    wanted = {p for found in (*top, relevant) for ids in found.values() for p in ids}
    texts = {p: collection.passages[place] for place, p in enumerate(collection.passage_ids) if p in wanted}
    for query in queries:
        query.relevant = [texts[p] for p in relevant[query.id] if p in texts]
        for name, found in zip(("hits_before", "hits_after"), top, strict=True):
            hits = [Hit(rank, texts[p], p in relevant[query.id]) for rank, p in enumerate(found[query.id], 1)]
            setattr(query, name, hits)
