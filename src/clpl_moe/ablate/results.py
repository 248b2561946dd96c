"""The results of an ablation: mean and spread over the seeds as table, JSON and picture."""

from __future__ import annotations

import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clpl_moe.ablate.options import AblateArguments
from clpl_moe.ablate.plan import Plan
from clpl_moe.common.errors import UserError
from clpl_moe.common.files import atomic_open, find_json, refuse_existing, refuse_unwritable, write_json
from clpl_moe.common.machine import machine, versions, without_folders
from clpl_moe.common.markup import in_markdown
from clpl_moe.report.charts import BLUE, GREY, INK, plain, save, style
from clpl_moe.report.text import percent


def summarize(plan: Plan, metric: str) -> list[dict[str, Any]]:
    """For each row: mean and spread (standard deviation over seeds, None of one) of the metric per language and of the
    languages' average, and how the error, 1 - metric, differs from the first row's (-0.1: a tenth less).

    ``average`` is over languages, seed by seed, and is None until all are there. ``error_change`` of the average compares
    average errors; ``error_change_mean`` is the mean of the languages' changes. ``peak_bytes`` is the most memory that a
    training of the row took, None where that is not known.
    """
    languages = [collection.language for collection in plan.collections]
    rows: list[dict[str, Any]] = []
    for name, label in plan.labels.items():
        values: dict[str, dict[int | None, float]] = {language: {} for language in languages}
        for run in plan.runs:
            if run.row == name and (value := run.metric(metric)) is not None:
                values[run.collection.language][run.seed] = value
        of_all = [seed for seed in values[languages[0]] if all(seed in found for found in values.values())]
        averages = [statistics.fmean(found[seed] for found in values.values()) for seed in of_all]
        cells = {language: _mean_and_spread(list(found.values())) for language, found in values.items()}
        trainings = [(run.result() or {}).get("training") for run in plan.runs if run.row == name]
        peaks = [peak for training in trainings if (peak := (training or {}).get("peak_bytes")) is not None]
        of_row = {"row": name, "label": label, "languages": cells, "average": _mean_and_spread(averages)}
        rows.append({**of_row, "peak_bytes": max(peaks, default=None)})
    for row in rows:
        changes = [_set_change(row["languages"][name], rows[0]["languages"][name]) for name in languages]
        _set_change(row["average"], rows[0]["average"])
        known = [change for change in changes if change is not None]
        row["error_change_mean"] = statistics.fmean(known) if len(known) == len(changes) else None
    return rows


def _mean_and_spread(values: list[float]) -> dict[str, Any]:
    mean = statistics.fmean(values) if values else None
    return {"mean": mean, "spread": statistics.stdev(values) if len(values) > 1 else None, "values": values}


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

    measured = any(row.get("peak_bytes") for row in summary)

    def line(row: dict[str, Any]) -> dict[str, str]:
        runs = [len(value["values"]) for value in row["languages"].values()]
        changes = [percent(value["error_change"]) for value in row["languages"].values()]
        return {
            "method": row["label"],
            "seeds": str(min(runs)) if min(runs) == max(runs) else f"{min(runs)}–{max(runs)}",
            **{language: cell(value) for language, value in row["languages"].items()},
            "average": cell(row["average"]),
            "error": percent(row["average"]["error_change"]),
            "error by language": ", ".join(changes),
            **({"memory": _gib(row.get("peak_bytes"))} if measured else {}),
        }

    first, *others = map(line, summary)
    return [first | {"error": "", "error by language": ""}, *others]


def _gib(count: int | None) -> str:
    return "–" if count is None else f"{count / 2**30:.2f} GiB"


def markdown(rows: list[dict[str, str]]) -> str:
    """The table in Markdown."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(map(in_markdown, columns)) + " |", "|---|" + "--:|" * (len(columns) - 1)]
    lines += ["| " + " | ".join(in_markdown(row[column]) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def question(arguments: AblateArguments) -> str:
    """What the table shows, in words."""
    split = arguments.mappings["evaluate"].get("split", "dev")
    return (
        f"{arguments.metric} on the {split} queries: mean and standard deviation over seeds. Error: 1 − {arguments.metric},"
        f" compared with the first row; of the average, and of {', '.join(arguments.mappings['languages'])}."
    )


def refuse_other_results(arguments: AblateArguments, plan: Plan) -> None:
    """Raise :class:`UserError` where results would be lost unasked: those of another metric, or of runs that this plan lacks."""
    path = Path(arguments.output)
    refuse_unwritable(path)
    known = {found["key"] for run in plan.runs if (found := run.result()) is not None}
    try:
        before = find_json(path) or {}
        metric, keys = before["settings"]["metric"], {run["key"] for run in before["measurements"]["runs"]}
    except (KeyError, TypeError):  # something else
        metric, keys = None, set()
    if metric == arguments.metric and keys <= known:
        return
    for place in (path, path.with_suffix(".md"), path.with_suffix(".png")):
        refuse_existing(place, arguments.overwrite)


def write_results(arguments: AblateArguments, plan: Plan, summary: list[dict[str, Any]], table: str) -> None:
    """Write JSON, Markdown and, where matplotlib is installed, the picture."""
    path = Path(arguments.output)
    results = [(run, run.result()) for run in plan.runs]
    finished = [result for _, result in results if result is not None]
    precisions = {result["dtype"] for result in finished}
    precisions |= {result["training"]["precision"] for result in finished if result["training"]}
    of_run = ("language", "seed", "key", "metrics", "dtype", "training", "machine")
    content = {
        "question": question(arguments),
        "command": shlex.join(["python", "-m", "clpl_moe.ablate", *without_folders(sys.argv[1:])]),
        "machine": machine(),
        "versions": versions(),
        "settings": {
            "model": Path(arguments.model).name,
            "precision": " and ".join(sorted(precisions)),
            "metric": arguments.metric,
            **{name: arguments.mappings[name] for name in ("mine", "train", "evaluate", "rows")},
        },
        "rows": table_rows(summary),
        "measurements": {
            "summary": summary,
            "runs": [
                {"row": run.row, **{k: found[k] for k in of_run}, "mixture": run.mixture()}
                for run, found in results
                if found is not None
            ],
            "missing": [str(run) for run, found in results if found is None],
        },
    }
    write_json(path, content)
    with atomic_open(path.with_suffix(".md")) as file:
        file.write(f"{table}\n")
    try:
        _plot(summary, arguments.metric, path.with_suffix(".png"))
    except UserError as error:
        print(f"no picture: {error}", file=sys.stderr)


@style()
def _plot(summary: Sequence[dict[str, Any]], metric: str, output: Path) -> None:
    """A panel for each language and for their average: of each row mean, spread, and each seed's value."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = list(summary[0]["languages"])
    panels = [(name, [row["languages"][name] for row in summary]) for name in names]
    if len(names) > 1:
        panels.append(("average", [row["average"] for row in summary]))
    figure = Figure(figsize=(2.2 + 2.6 * len(panels), 1.1 + 0.38 * len(summary)), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, cells) in zip(all_axes, panels, strict=True):
        for place, cell in enumerate(cells):
            if cell["mean"] is None:
                continue
            color = GREY if place == 0 else BLUE
            how = {"color": color, "markersize": 6, "capsize": 3, "zorder": 3}
            axes.errorbar(cell["mean"], place, xerr=cell["spread"], fmt="o", **how)
            if len(cell["values"]) > 1:
                axes.plot(cell["values"], [place] * len(cell["values"]), "|", color=color, alpha=0.5, markersize=9)
        if cells[0]["mean"] is not None:
            axes.axvline(cells[0]["mean"], color=GREY, linewidth=1, linestyle=(0, (3, 3)), zorder=1)
        axes.set_title(plain(title), weight="bold")
        axes.set_xlabel(metric)
        axes.xaxis.set_major_locator(MaxNLocator(3, prune="both"))
        axes.margins(x=0.12)
        axes.grid(axis="y", visible=False)
    all_axes[0].set_yticks(range(len(summary)), [plain(row["label"]) for row in summary])
    all_axes[0].set_ylim(len(summary) - 0.5, -0.5)
    all_axes[0].tick_params(axis="y", labelcolor=INK, length=0)
    save(figure, output)
