"""The table of an ablation: mean and spread over the seeds, and the error relative to the first row."""

from __future__ import annotations

import statistics
from typing import Any

from clpl_moe.ablate.plan import Plan
from clpl_moe.report.text import percent


def summarize(plan: Plan, metric: str) -> list[dict[str, Any]]:
    """For each row: mean and spread (standard deviation over seeds, None of one) of the metric per language and of the
    languages' average, and how the error, 1 - metric, differs from the first row's (-0.1: a tenth less).

    ``average`` is over languages, seed by seed, and is None until all are there. ``error_change`` of the average compares
    average errors; ``error_change_mean`` is the mean of the languages' changes.
    """
    languages = [collection.language for collection in plan.collections]
    rows: list[dict[str, Any]] = []
    for name, label in plan.labels.items():
        values: dict[str, dict[int | None, float]] = {language: {} for language in languages}
        for run in plan.runs:
            if run.row == name and (value := run.metric(metric)) is not None:
                values[run.collection.language][run.seed] = value
        seeds = dict.fromkeys(seed for found in values.values() for seed in found)
        averages = [
            statistics.fmean(found[seed] for found in values.values())
            for seed in seeds
            if all(seed in found for found in values.values())
        ]
        cells = {language: _mean_and_spread(list(found.values())) for language, found in values.items()}
        rows.append({"row": name, "label": label, "languages": cells, "average": _mean_and_spread(averages)})
    for row in rows:
        changes = [_set_change(row["languages"][name], rows[0]["languages"][name]) for name in languages]
        _set_change(row["average"], rows[0]["average"])
        known = [change for change in changes if change is not None]
        row["error_change_mean"] = statistics.fmean(known) if len(known) == len(changes) else None
    return rows


def _mean_and_spread(values: list[float]) -> dict[str, Any]:
    return {
        "mean": statistics.fmean(values) if values else None,
        "spread": statistics.stdev(values) if len(values) > 1 else None,
        "values": values,
    }


def _set_change(cell: dict[str, Any], base: dict[str, Any]) -> float | None:
    known = cell["mean"] is not None and base["mean"] is not None and base["mean"] < 1
    cell["error_change"] = (1 - cell["mean"]) / (1 - base["mean"]) - 1 if known else None
    return cell["error_change"]


def table_rows(summary: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The lines of the table, column -> text."""

    def cell(value: dict[str, Any]) -> str:
        if value["mean"] is None:
            return "–"
        return f"{value['mean']:.4f}" + ("" if value["spread"] is None else f" ± {value['spread']:.4f}")

    lines = []
    for number, row in enumerate(summary):
        runs = [len(value["values"]) for value in row["languages"].values()]
        changes = [percent(value["error_change"]) for value in row["languages"].values()]
        lines.append(
            {
                "method": row["label"],
                "seeds": str(min(runs)) if min(runs) == max(runs) else f"{min(runs)}–{max(runs)}",
                **{language: cell(value) for language, value in row["languages"].items()},
                "average": cell(row["average"]),
                "error": "" if number == 0 else percent(row["average"]["error_change"]),
                "error by language": "" if number == 0 else ", ".join(changes),
            }
        )
    return lines


def markdown(rows: list[dict[str, str]]) -> str:
    """The table in Markdown."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "--:|" * (len(columns) - 1)]
    lines += ["| " + " | ".join(row[column] for column in columns) + " |" for row in rows]
    return "\n".join(lines)
