"""What was retrieved before and after a run, query by query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clpl_moe.common.errors import UserError, at
from clpl_moe.common.files import atomic_open
from clpl_moe.common.markup import csv_writer, to_csv
from clpl_moe.evaluate.metrics import evaluate_run, read_trec_run
from clpl_moe.evaluate.tasks import METRICS_FILE, read_result
from clpl_moe.report.options import ReportArguments
from clpl_moe.retrieval.collection import Collection


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
    """A run's results on one language beside those of its base model."""

    run: str
    language: str
    metric: str
    queries: list[QueryChange]  # all that are judged
    gained: list[QueryChange]  # most, with texts and passages
    lost: list[QueryChange]
    passages: int  # in the corpus

    def mean(self, when: str) -> float:
        """Mean of the metric over the queries, ``before`` or ``after``."""
        return sum(getattr(query, when) for query in self.queries) / len(self.queries)

    @property
    def error_change(self) -> float | None:
        """The change of the error, 1 - mean, relative to the error before; None where there was none."""
        error = 1 - self.mean("before")
        return (1 - self.mean("after")) / error - 1 if error > 0 else None

    def counts(self) -> tuple[int, int, int]:
        """How many queries gained, lost, and stayed."""
        gained, lost = (sum(sign * q.change > 1e-9 for q in self.queries) for sign in (1, -1))
        return gained, lost, len(self.queries) - gained - lost


def languages_of(folder: Path) -> list[str]:
    """The languages of which a folder of ``clpl_moe.evaluate`` holds results."""
    return sorted(path.parent.name for path in folder.glob("*/run.trec"))


def compare_results(run: str, before: Path, after: Path, language: str, arguments: ReportArguments) -> BeforeAfter:
    """Compare the results of a run and of its base model, as ``evaluate`` writes them, on one language.

    Raises :class:`UserError` where results or collection are missing, or the results are of another collection.
    """
    about = [read_result(folder / language / METRICS_FILE) for folder in (before, after)]
    if about[0]["collection_hash"] != about[1]["collection_hash"]:
        other = f"its results are of another collection than those of {before / language}"
        raise UserError(f"{at(after / language)}: {other}")
    loaded = Collection.load(arguments.collection or about[1]["collection"], language, about[1]["split"])
    if loaded.fingerprint() != about[1]["collection_hash"]:
        raise UserError(
            f"{at(loaded.directory / language)}: not the collection that {after / language} has results of, or changed since"
        )
    metric, examples = arguments.metric, arguments.examples
    runs = [read_trec_run(folder / language / "run.trec", loaded) for folder in (before, after)]
    values = [evaluate_run(loaded.qrels, found, [metric])[1] for found in runs]
    texts = dict(zip(loaded.query_ids, loaded.queries))
    queries = [QueryChange(q, texts[q], values[0][q][metric], values[1][q][metric]) for q in loaded.qrels]
    ordered = sorted(queries, key=lambda query: (query.change, query.id))
    lost = [query for query in ordered[:examples] if query.change < -1e-9]
    gained = [query for query in ordered[::-1][:examples] if query.change > 1e-9]
    _add_passages([*gained, *lost], loaded, runs, arguments.passages)
    return BeforeAfter(run, language, metric, queries, gained, lost, len(loaded.passages))


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
        query.hits_before, query.hits_after = (
            [Hit(rank, texts[p], p in relevant[query.id]) for rank, p in enumerate(found[query.id], 1)] for found in top
        )


def write_queries(path: Path, comparisons: Sequence[BeforeAfter]) -> None:
    """Write every query of the comparisons as CSV, each run's from the greatest gain to the greatest loss."""
    with atomic_open(path) as file:
        writer = csv_writer(file)
        metric = comparisons[0].metric
        writer.writerow(["run", "language", "query_id", "query", f"{metric} before", f"{metric} after", "change"])
        for c in comparisons:
            for q in sorted(c.queries, key=lambda query: (-query.change, query.id)):
                values = (f"{value:.6g}" for value in (q.before, q.after, q.change))
                writer.writerow([*map(to_csv, (c.run, c.language, q.id, q.text)), *values])
