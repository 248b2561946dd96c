"""Draw the figures of the README; none of them needs a LaTeX installation.

Regenerate ``imgs/formula.png`` and ``imgs/clpl.png`` (a few seconds on a CPU, deterministic)::

    pip install -e ".[figures]"
    python scripts/make_figures.py

Draw the curves of a training run from its ``metrics.jsonl``::

    python scripts/make_figures.py --run runs/quickstart --output imgs/quickstart.png --overwrite

``formula.png`` states the loss of ``clpl_moe.loss``. ``clpl.png`` is computed, not sketched: four unit
vectors in three dimensions (a query, its positive, a hard negative and a query that this negative answers)
follow the gradient of ``clpl_moe.CLPLLoss`` from the same start, once with the penalty weight 0 (the
contrastive loss alone) and once with the published weight, and are drawn on a map of the sphere.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clpl_moe.common.errors import UserError, at, command
from clpl_moe.common.files import refuse_existing
from clpl_moe.report.charts import BLUE, GREEN, GREY, INK, PALE, PURPLE, VERMILLION, draw_curve, save, style
from clpl_moe.report.course import series
from clpl_moe.train.metrics_file import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

IMAGES = Path(__file__).resolve().parent.parent / "imgs"

TEMPERATURE, PENALTY_WEIGHT = 0.02, 0.1  # as published
STEPS, LEARNING_RATE = 2000, 0.002

# Longitude and latitude in degrees. The negative is hard: nearer to the query than the positive is. Its own
# query is on the query's side of it, so that a push away from the query is also one away from its own.
START = {"query": (0, 0), "positive": (-25, -32), "negative": (23, -2), "negative_query": (8, 16)}
# Symbol, name, colour, marker (queries are circles, passages squares) and the label's offset in points.
LABELS = {
    "query": ("$h_i$", "query", BLUE, "o", (-12, 5)),
    "positive": ("$h_i^{+}$", "positive", GREEN, "s", (10, -4)),
    "negative": ("$h^{\\prime}$", "hard negative", VERMILLION, "s", (9, 0)),
    "negative_query": ("$h^{*}$", "negative's own query", PURPLE, "o", (9, 9)),
}


def plot_formula(output: Path) -> Path:
    """The loss, typeset, with the meaning of its symbols."""
    with style(mathtext="cm"):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 5.4))
        terms = [
            (
                0.87,
                "contrastive",
                BLUE,
                r"$\mathrm{CL}_i \;=\; {-}\log\;\dfrac{\exp\left(\mathrm{sim}(h_i,\,h_i^{+})\,/\,\tau\right)}"
                r"{\sum_{d\,\in\,\{h_i^{+}\}\,\cup\,H_i^{\prime}}\;\exp\left(\mathrm{sim}(h_i,\,d)\,/\,\tau\right)}$",
            ),
            (
                0.642,
                "penalty",
                VERMILLION,
                r"$\mathrm{PEN}_i \;=\; \dfrac{1}{|P_i|}\;\sum_{(h^{\prime},\,h^{*})\,\in\,P_i}\;"
                r"\left(1 - \mathrm{sim}(h^{\prime},\,h^{*})\right)$",
            ),
            (
                0.465,
                "loss",
                INK,
                r"$\mathrm{CLPL}_i \;=\; (1 - \lambda)\;\mathrm{CL}_i \;+\; \lambda\;\mathrm{PEN}_i$",
            ),
        ]
        for height, name, color, formula in terms:
            figure.text(0.04, height, name, color=color, fontsize=12, va="baseline", weight="bold")
            figure.text(0.17, height, formula, fontsize=19, va="baseline")
        figure.add_artist(_rule([0.04, 0.96], [0.395, 0.395]))
        columns = [
            (
                (0.04, 0.125),
                [
                    (r"$h_i$", "embedding of query $i$"),
                    (r"$h_i^{+}$", "its positive passage"),
                    (r"$H_i^{\prime}$", "its hard negatives"),
                    (r"$H^{*}(h^{\prime})$", r"positive queries of $h^{\prime}$: those it answers"),
                ],
            ),
            (
                (0.49, 0.55),
                [
                    (
                        r"$P_i$",
                        r"all pairs with $h^{\prime} \in H_i^{\prime}$ and $h^{*} \in H^{*}(h^{\prime})$",
                    ),
                    (r"$\tau$", "temperature (published: 0.02)"),
                    (r"$\lambda$", "share of the penalty (published: 0.1)"),
                    (r"$\mathrm{sim}$", "cosine similarity"),
                ],
            ),
        ]
        for (left, right), rows in columns:
            for row, (symbol, meaning) in enumerate(rows):
                height = 0.335 - 0.066 * row
                figure.text(left, height, symbol, fontsize=14, va="center")
                figure.text(right, height, meaning, fontsize=10.5, va="center")
        figure.text(
            0.04,
            0.05,
            r"The loss is the mean of $\mathrm{CLPL}_i$ over the queries; a query without pairs has"
            r" $\mathrm{CLPL}_i = \mathrm{CL}_i$. In-batch negatives join the sum of $\mathrm{CL}_i$.",
            fontsize=10,
            color=GREY,
            va="center",
        )
        return save(figure, output)


def _rule(x: Sequence[float], y: Sequence[float]) -> Line2D:
    """A thin dividing line, in fractions of the figure."""
    from matplotlib.lines import Line2D

    return Line2D(x, y, color=PALE, linewidth=1.2)


def trajectories(penalty_weight: float, steps: int = STEPS, learning_rate: float = LEARNING_RATE) -> np.ndarray:
    """Where gradient descent on :class:`clpl_moe.CLPLLoss` takes the four points of ``START``.

    Plain steps on free vectors, each scaled back to length 1.

    Returns:
        (steps + 1, 4, 3) float64 unit vectors, in the order of ``START``.
    """
    import torch

    from clpl_moe import CLPLLoss

    longitude, latitude = np.radians(np.array(list(START.values()), dtype=float)).T
    start = np.stack(
        [np.sin(longitude) * np.cos(latitude), np.sin(latitude), np.cos(longitude) * np.cos(latitude)],
        axis=-1,
    )
    loss = CLPLLoss(temperature=TEMPERATURE, penalty_weight=penalty_weight)
    points = torch.tensor(start, dtype=torch.float64, requires_grad=True)  # (4, 3)
    negative_index = torch.tensor([1])
    path = [start]
    for _ in range(steps):
        terms = loss(points[:1], points[1:3], negative_queries=points[3:], negative_index=negative_index)
        (gradient,) = torch.autograd.grad(terms.loss, points)
        moved = points.detach() - learning_rate * gradient
        points = torch.nn.functional.normalize(moved, dim=-1).requires_grad_()
        path.append(points.detach().numpy())
    return np.stack(path)


def project(points: np.ndarray) -> np.ndarray:
    """Azimuthal equidistant map, in degrees, of unit vectors (..., 3) as (..., 2).

    Angles from the centre, the query's start, are kept exactly; other angles nearly, this close to it.
    """
    direction, angle = points[..., :2], np.degrees(np.arccos(np.clip(points[..., 2:], -1, 1)))
    return angle * direction / np.maximum(np.linalg.norm(direction, axis=-1, keepdims=True), 1e-12)


def plot_clpl(output: Path, steps: int = STEPS) -> Path:
    """The contrastive loss alone beside CLPL, from the same start."""
    with style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 6.3))
        panels = figure.subplots(1, 2)
        figure.subplots_adjust(left=0.015, right=0.985, top=0.9, bottom=0.3, wspace=0.03)
        titles = [
            ("Contrastive loss alone", 0.0, "drives the negative away from its own query, too"),
            ("CLPL", PENALTY_WEIGHT, "keeps the negative near its own query"),
        ]
        for axes, (title, weight, effect) in zip(panels, titles, strict=True):
            path = trajectories(weight, steps)
            _draw_map(axes, path)
            _draw_cosines(axes, path)
            axes.set_title(f"{title} ($\\lambda = {weight:g}$)", fontsize=13, weight="bold", pad=22)
            axes.text(0.5, 1.025, effect, fontsize=10.5, color=GREY, ha="center", transform=axes.transAxes)
        figure.add_artist(_rule([0.5, 0.5], [0.11, 0.97]))
        figure.text(
            0.5,
            0.043,
            f"Computed with clpl_moe.CLPLLoss, $\\tau = {TEMPERATURE}$: the same start (hollow), then"
            f" {steps:,} steps of gradient descent (rate {LEARNING_RATE}) to the end (filled).\nFour free"
            " unit vectors in three dimensions take the place of an encoder."
            " Rings: angle from the query's start.",
            fontsize=9,
            color=GREY,
            ha="center",
            va="center",
            linespacing=1.5,
        )
        return save(figure, output)


def _draw_map(axes: Axes, path: np.ndarray) -> None:
    """Start, way and end of each point, and the link of the negative to its own query before and after."""
    from matplotlib.patches import Circle

    for radius in (15, 30):
        axes.add_patch(Circle((0, 0), radius, fill=False, edgecolor=PALE, linewidth=1))
        axes.annotate(
            f"{radius}°",
            radius * np.array([math.cos(math.radians(118)), math.sin(math.radians(118))]),
            color=GREY,
            fontsize=8,
            ha="center",
            va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    order = list(START)
    pair = [order.index("negative"), order.index("negative_query")]
    links = ((path[0], (0, (3, 3)), GREY, (-13, -7)), (path[-1], "solid", INK, (13, 7)))
    for points, linestyle, color, offset in links:
        negative, own_query = points[pair]
        # The straight way between two unit vectors, scaled back to length 1, is their great circle.
        arc = negative + np.linspace(0, 1, 41)[:, None] * (own_query - negative)
        arc = project(arc / np.linalg.norm(arc, axis=-1, keepdims=True))
        axes.plot(*arc.T, linestyle=linestyle, color=color, linewidth=1.2, zorder=1)
        axes.annotate(
            f"{math.degrees(math.acos(negative @ own_query)):.0f}°",
            arc[20],
            xytext=offset,
            textcoords="offset points",
            color=color,
            fontsize=10.5,
            ha="center",
            va="center",
        )
    for name, (symbol, label, color, marker, offset) in LABELS.items():
        index = order.index(name)
        way = project(path[:, index])
        hollow = {"markerfacecolor": "white", "markeredgecolor": color, "markeredgewidth": 1.6}
        axes.plot(*way.T, color=color, linewidth=2, zorder=2)
        axes.plot(*way[0], marker, markersize=8, zorder=3, **hollow)
        axes.plot(*way[-1], marker, markersize=9, color=color, zorder=4)
        _draw_arrow(axes, way, color)
        axes.annotate(
            f"{symbol} {label}",
            way[-1],
            xytext=offset,
            textcoords="offset points",
            color=color,
            fontsize=10,
            ha="right" if offset[0] < 0 else "left",
            va="center",
        )
    axes.set(xlim=(-33, 56), ylim=(-38, 31), aspect="equal", xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _draw_arrow(axes: Axes, way: np.ndarray, color: str) -> None:
    """An arrow head on a way that is long enough to show one."""
    lengths = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(way, axis=0), axis=-1))])
    if lengths[-1] < 3:
        return
    # Past the middle, so that on a way that turns the head points to where the point ends up.
    at_head = 0.75 * lengths[-1]
    tail, head = (np.array([np.interp(x, lengths, axis) for axis in way.T]) for x in (at_head - 1, at_head))
    axes.annotate("", head, xytext=tail, arrowprops={"arrowstyle": "-|>", "color": color, "mutation_scale": 15})


def _draw_cosines(axes: Axes, path: np.ndarray) -> None:
    """The panel's caption: cosines and angles of three pairs before and after."""
    rows = [
        ("query – positive", "query", "positive"),
        ("query – hard negative", "query", "negative"),
        ("negative – its own query", "negative", "negative_query"),
    ]
    order = list(START)
    columns = (0.06, 0.69, 0.94)
    below = {"transform": axes.transAxes, "va": "center", "fontsize": 10, "clip_on": False}
    for x, heading in zip(columns, ("cosine (angle)", "before", "after"), strict=True):
        axes.text(x, -0.04, heading, color=GREY, ha="left" if x == columns[0] else "right", **below)
    for row, (label, first, second) in enumerate(rows):
        weight = "bold" if second == "negative_query" else "normal"
        height = -0.115 - 0.073 * row
        axes.text(columns[0], height, label, weight=weight, **below)
        for x, points in zip(columns[1:], (path[0], path[-1]), strict=True):
            cosine = float(points[order.index(first)] @ points[order.index(second)])
            angle = math.degrees(math.acos(min(1.0, cosine)))
            axes.text(x, height, f"{cosine:.2f} ({angle:.0f}°)", ha="right", weight=weight, **below)


def plot_run(metrics_jsonl: str | Path, output: str | Path) -> Path:
    """Loss terms, similarities and nDCG of a training run over its steps.

    Args:
        metrics_jsonl: a run's ``metrics.jsonl``; a panel without any of its values is left out, and a curve
            of 60 values or more is drawn as its moving mean over the values themselves, faint.
        output: the PNG to write.

    Raises:
        UserError: the file is missing or not JSONL, or holds nothing that could be drawn.
    """
    records = read_metrics(Path(metrics_jsonl))
    cutoffs = sorted(
        {name for record in records for name in record if name.startswith("eval_ndcg@")},
        key=lambda name: (len(name), name),
    )
    panels = [
        (
            "Loss",
            [("loss", "loss", INK), ("contrastive", "contrastive", BLUE), ("penalty", "penalty", VERMILLION)],
        ),
        (
            "Mean cosine similarity",
            [
                ("positive_similarity", "query – positive", GREEN),
                ("negative_similarity", "query – hard negative", VERMILLION),
                ("negative_query_similarity", "negative – its own query", PURPLE),
            ],
        ),
        (
            "nDCG on the dev queries",
            [
                (name, name.removeprefix("eval_ndcg").replace("@", "nDCG@"), color)
                for name, color in zip(cutoffs, (BLUE, GREEN, PURPLE))
            ],
        ),
    ]
    drawn = []
    for title, curves in panels:
        curves = [(series(records, name), label, color) for name, label, color in curves]
        curves = [curve for curve in curves if len(curve[0])]
        if curves:
            drawn.append((title, curves))
    if not drawn:
        raise UserError(f"{at(metrics_jsonl)}: no line has a step with a loss, a similarity or an nDCG to draw")
    with style():
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        figure = Figure(figsize=(3.9 * len(drawn), 3.5), layout="constrained")
        for axes, (title, curves) in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
            for points, label, color in curves:
                draw_curve(axes, points, label, color)
            axes.set_title(title, weight="bold")
            axes.set_xlabel("optimizer step")
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.legend(loc="best")
        return save(figure, Path(output))


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the README's figures, or the curves of a training run.")
    parser.add_argument("--run", metavar="DIR", type=Path, help="draw this run's metrics.jsonl, not the figures")
    parser.add_argument(
        "--output",
        metavar="PATH",
        type=Path,
        help="with --run the PNG (default: metrics.png in the run's folder), else the folder of the figures"
        " (default: imgs of the repository), which are replaced",
    )
    parser.add_argument(
        "--overwrite",
        nargs="?",
        const="true",
        default="false",
        choices=("true", "false"),
        help="replace the PNG of --run (default: false)",
    )
    args = parser.parse_args(argv)
    if args.run is None:
        folder = args.output or IMAGES
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{at(folder)}: not a folder; without --run, --output is the folder of the figures")
        written = [plot_formula(folder / "formula.png"), plot_clpl(folder / "clpl.png")]
    else:
        output = args.output or args.run / "metrics.png"
        if output.suffix.lower() != ".png":
            raise UserError(f"{at(output)}: with --run, --output is the picture to write, a name ending in .png")
        refuse_existing(output, args.overwrite == "true")
        written = [plot_run(args.run / "metrics.jsonl", output)]
    for path in written:
        print(path)


if __name__ == "__main__":
    main()
