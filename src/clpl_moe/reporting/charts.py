"""Pictures of runs and comparisons, drawn with matplotlib (the extra ``figures``)."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clpl_moe.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart with any colour vision.
BLUE, GREEN, VERMILLION, PURPLE, ORANGE, SKY = "#0072B2", "#009E73", "#D55E00", "#A65187", "#E69F00", "#56B4E9"
INK, GREY, PALE = "#1a1a1a", "#6b6b6b", "#e6e6e6"
PALETTE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)


@contextlib.contextmanager
def style(mathtext: str = "dejavusans") -> Iterator[None]:
    """One look for all figures, whatever matplotlibrc the user has; only fonts that come with matplotlib.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError('matplotlib is not installed: pip install "clpl-moe[figures]"') from None
    ours = {
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "mathtext.fontset": mathtext,
        "text.color": INK,
        "axes.edgecolor": GREY,
        "axes.labelcolor": INK,
        "axes.titlesize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": PALE,
        "xtick.color": GREY,
        "ytick.color": GREY,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "lines.linewidth": 1.8,
        "figure.dpi": 150,
        # Opaque, so that the ink is readable on a dark page too.
        "figure.facecolor": "white",
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(ours)
        yield


def save(figure: Figure, output: Path) -> Path:
    """Write a PNG; nothing is written where drawing fails."""
    from PIL import Image  # matplotlib depends on it

    drawn, buffer = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png")
    # A palette is enough for text and lines and halves the file; dithering would speckle the white.
    Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(buffer, "png", optimize=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(buffer.getvalue())
    return output


def plot_comparison(summary: Sequence[dict[str, Any]], metric: str, output: Path) -> Path:
    """Rows of an ablation, a panel for each language and for their average: mean, spread, and each seed's value.

    Args:
        summary: as :func:`clpl_moe.ablate.summarize` returns it.
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
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.grid(axis="y", visible=False)
        all_axes[0].set_yticks(range(len(summary)), [row["label"] for row in summary])
        all_axes[0].set_ylim(len(summary) - 0.5, -0.5)
        all_axes[0].tick_params(axis="y", labelcolor=INK, length=0)
        return save(figure, output)
