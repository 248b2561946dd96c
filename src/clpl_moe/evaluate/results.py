"""What an evaluation found: its tables as text, and ``per_query.csv``."""

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
        model: as it was asked for; ``label`` is its short name.
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
        parts = [_format_results(self.results)] if self.results else []
        dense = [r for r in self.results if r.score == DENSE]
        if quantized := [r for r in dense if "quantize" in r.about["settings"]]:
            parts.append(_format_losses(quantized))
        if approximate := [r for r in dense if "index" in r.about["settings"]]:
            parts.append(_format_approximate(approximate))
        if self.comparisons:
            parts.append(f"{_format_comparisons(self.comparisons)}\n{TEST}")
        return "\n\n".join(parts)


def _format_results(results: Sequence[Result]) -> str:
    """A row per model, kind of score and language, and the average over several languages."""
    names = list(results[0].metrics)
    rows = [["model", "score", "language", "queries", *names]]
    for model, score in dict.fromkeys((r.model, r.score) for r in results):
        own = [r for r in results if (r.model, r.score) == (model, score)]
        for r in own:
            values = [f"{r.metrics[name]:.4f}" for name in names]
            rows.append([r.label, score, r.language, str(len(r.per_query)), *values])
        if len(own) > 1:
            means = [f"{sum(r.metrics[name] for r in own) / len(own):.4f}" for name in names]
            rows.append([own[0].label, score, "average", "", *means])
    return _align(rows, left=3)


def _format_losses(results: Sequence[Result]) -> str:
    """A row for each search on quantized embeddings: how its metrics differ from an exact search's, and the memory."""
    names = list(results[0].metrics)
    rows = [["quantized - exact", "language", "search", *names, "MB", "MB in float32"]]
    for r in results:
        losses = [f"{r.metrics[name] - r.about['exact_metrics'][name]:+.4f}" for name in names]
        memory = [f"{size / 2**20:.2f}" for size in r.about["bytes"].values()]
        rows.append([r.label, r.language, r.about["settings"]["quantize"], *losses, *memory])
    return _align(rows, left=3)


def _format_approximate(results: Sequence[Result]) -> str:
    """A row for each search in an approximate index: what it finds of an exact search's passages, and its time."""
    rows = [["approximate", "language", "recall", "measured on", "lists", "index s", "search s", "exact s, about"]]
    for r in results:
        found = r.about["approximate"]
        lists, seconds = f"{found['lists_searched']} of {found['lists']}", found["seconds"]
        times = [f"{seconds.get(name, 0):.1f}" for name in ("index", "search", "exact")]
        rows.append([r.label, r.language, f"{found['recall']:.4f}", f"{found['sample']} queries", lists, *times])
    return _align(rows, left=2)


def _format_comparisons(comparisons: Sequence[dict[str, Any]]) -> str:
    """A row per language, kind of score, metric and pair of models."""
    rows = [["second - first", "score", "language", "metric", "difference", "better", "worse", "p", "p (Holm)"]]
    for c in comparisons:
        numbers = [f"{c['difference']:+.4f}", str(c["better"]), str(c["worse"]), f"{c['p']:.4f}", f"{c['p_holm']:.4f}"]
        rows.append([f"{c['second']} - {c['first']}", c["score"], c["language"], c["metric"], *numbers])
    return _align(rows, left=4)


def _align(rows: list[list[str]], left: int) -> str:
    """Columns of equal width, without the second one (score) where it is ``dense`` throughout."""
    if all(row[1] == DENSE for row in rows[1:]):
        rows, left = [[row[0], *row[2:]] for row in rows], left - 1
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        words = [w.ljust(n) if column < left else w.rjust(n) for column, (w, n) in enumerate(zip(row, widths))]
        lines.append("  ".join(words).rstrip())
    return "\n".join(lines)
