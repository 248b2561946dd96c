"""What an evaluation found, and its tables as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clpl_moe.evaluate.metrics import DENSE
from clpl_moe.evaluate.significance import TEST


@dataclass
class Result:
    """One model's retrieval on one language, ranked by one kind of score.

    Attributes:
        model: the model as it was asked for; ``label`` is its short name.
        score: ``dense``, or one of ``M3_SCORES``.
        metrics: metric -> mean over the judged queries.
        per_query: query id -> metric -> value, for each judged query.
        folder: holds the run file, the judgements and the file of metrics.
        about: content of that file: hashes of model and collection, settings, durations, versions.
    """

    model: str
    label: str
    language: str
    score: str
    metrics: dict[str, float]
    per_query: dict[str, dict[str, float]] = field(repr=False)
    folder: Path
    about: dict[str, Any] = field(repr=False)

    @property
    def system(self) -> str:
        """Label of model and score, as the columns of ``per_query.csv`` have it."""
        return self.label if self.score == DENSE else f"{self.label} {self.score}"


@dataclass
class Evaluation:
    """What :func:`clpl_moe.evaluate.evaluate` found; printed, it is a table.

    Attributes:
        results: one for each model, language and kind of score; models outermost.
        comparisons: for each language, kind of score, metric and pair of models the fields of a
            :class:`clpl_moe.evaluate.significance.Comparison`, as in ``significance.json``; empty for one model.
        table: ``per_query.csv``, with each model's metrics of each query.
    """

    results: list[Result]
    comparisons: list[dict[str, Any]]
    table: Path

    def __str__(self) -> str:
        parts = [format_results(self.results)] if self.results else []
        if self.comparisons:
            parts.append(f"{format_comparisons(self.comparisons)}\n{TEST}")
        return "\n\n".join(parts)


def format_results(results: Sequence[Result]) -> str:
    """An aligned table: a row per model, kind of score and language, and the average over several languages."""
    names = list(results[0].metrics)
    several = any(r.score != DENSE for r in results)
    rows = [["model", *(["score"] if several else []), "language", "queries", *names]]
    for model, score in dict.fromkeys((r.model, r.score) for r in results):
        own = [r for r in results if (r.model, r.score) == (model, score)]
        first = [own[0].label, *([score] if several else [])]
        for result in own:
            values = [f"{result.metrics[n]:.4f}" for n in names]
            rows.append([*first, result.language, str(len(result.per_query)), *values])
        if len(own) > 1:
            means = [f"{sum(r.metrics[n] for r in own) / len(own):.4f}" for n in names]
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
