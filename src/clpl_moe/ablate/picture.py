"""The picture of an ablation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clpl_moe.report.charts import BLUE, GREY, INK, save, style


def plot_comparison(summary: Sequence[dict[str, Any]], metric: str, output: Path) -> Path:
    """Rows of an ablation, a panel for each language and for their average: mean, spread, and each seed's value.

    Args:
        summary: as :func:`clpl_moe.ablate.table.summarize` returns it.
        metric: its name, for the axis.
        output: the PNG to write.
    """
    with style():
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
                axes.errorbar(
                    cell["mean"], place, xerr=cell["spread"], fmt="o", color=color, markersize=6, capsize=3, zorder=3
                )
                if len(cell["values"]) > 1:
                    axes.plot(cell["values"], [place] * len(cell["values"]), "|", color=color, alpha=0.5, markersize=9)
            if cells[0]["mean"] is not None:
                axes.axvline(cells[0]["mean"], color=GREY, linewidth=1, linestyle=(0, (3, 3)), zorder=1)
            axes.set_title(title, weight="bold")
            axes.set_xlabel(metric)
            axes.xaxis.set_major_locator(MaxNLocator(3, prune="both"))
            axes.margins(x=0.12)
            axes.grid(axis="y", visible=False)
        all_axes[0].set_yticks(range(len(summary)), [row["label"] for row in summary])
        all_axes[0].set_ylim(len(summary) - 0.5, -0.5)
        all_axes[0].tick_params(axis="y", labelcolor=INK, length=0)
        return save(figure, output)
