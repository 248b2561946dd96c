"""Pictures of runs, drawn with matplotlib (the extra ``figures``)."""

from __future__ import annotations

import contextlib
import html
import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clpl_moe.common.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart with any colour vision.
BLUE, GREEN, VERMILLION, PURPLE, ORANGE, SKY = "#0072B2", "#009E73", "#D55E00", "#A65187", "#E69F00", "#56B4E9"
INK, GREY, PALE = "#1a1a1a", "#6b6b6b", "#e6e6e6"
PALETTE = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY)


@contextlib.contextmanager
def style(mathtext: str = "dejavusans", *, small: bool = False) -> Iterator[None]:
    """One look for all figures, whatever matplotlibrc the user has; only fonts that come with matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise UserError('matplotlib is not installed: pip install "clpl-moe[figures]"') from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rc("font", family="DejaVu Sans", size=9 if small else 10)
        matplotlib.rc("mathtext", fontset=mathtext)
        matplotlib.rc("text", color=INK)
        matplotlib.rc("axes", edgecolor=GREY, labelcolor=INK, titlesize=10 if small else 11, grid=True, axisbelow=True)
        matplotlib.rc("axes.spines", top=False, right=False)
        matplotlib.rc("grid", color=PALE)
        matplotlib.rc("xtick", color=GREY)
        matplotlib.rc("ytick", color=GREY)
        matplotlib.rc("legend", frameon=False, fontsize=8 if small else 9)
        matplotlib.rc("lines", linewidth=1.5 if small else 1.8)
        matplotlib.rc("figure", dpi=150, facecolor="white")  # opaque: the ink is readable on a dark page, too
        yield


def plain(text: str) -> str:
    """A label as it is: no formula in it, and shown in a legend also where it begins with an underscore."""
    text = text.replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text


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


Series = Sequence[tuple[float, float]]


@style(small=True)
def plot_curves(curves: Sequence[tuple[str, Series]], title: str, unit: str) -> Figure:
    """One value over the optimizer steps, a line for each run (name, points)."""
    figure, axes = _small_figure(title, "optimizer step", unit, whole_numbers=True)
    for (name, points), color in zip(curves, _colors(len(curves)), strict=True):
        draw_curve(axes, points, name, color)
    axes.ticklabel_format(axis="y", scilimits=(-3, 4))
    if len(curves) > 1:
        figure.legend(loc="outside lower left", ncols=1)
    return figure


def draw_curve(axes: Axes, points: Series, label: str, color: str) -> None:
    """A curve of steps and values; a long one, noisy as batches are, as its moving mean over a faint one."""
    import numpy as np

    values = np.array(points, dtype=float)
    window = len(values) // 20
    if window < 3:
        axes.plot(*values.T, color=color, label=plain(label), marker="o", markersize=3)
        return
    axes.plot(*values.T, color=color, alpha=0.25, linewidth=0.8)
    mean = np.stack([np.convolve(column, np.ones(window) / window, mode="valid") for column in values.T])
    axes.plot(*mean, color=color, label=plain(label))


@style(small=True)
def plot_expert_load(
    steps: Sequence[float], loads: Sequence[Sequence[Sequence[float]]], layers: Sequence[int]
) -> Figure:
    """Shares of the tokens that go to each expert, stacked, over the optimizer steps: a panel for each layer.

    ``steps`` (S,), ``loads`` (S, L, N), of which the N of a layer sum to 1, and ``layers`` (L,), their numbers.
    """
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    shares = np.array(loads, dtype=float)
    places = np.array(steps, dtype=float)
    if len(places) == 1:  # an area needs two
        places, shares = np.concatenate([places, places + 1]), np.concatenate([shares, shares])
    experts, columns = shares.shape[2], min(3, len(layers))
    rows = -(-len(layers) // columns)
    figure = Figure(figsize=(_SMALL[0], 0.75 + 0.85 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for number, axes in enumerate(panels.flat):
        if number >= len(layers):
            axes.set_visible(False)
            continue
        axes.stackplot(places, shares[:, number].T, colors=_colors(experts), alpha=0.85, linewidth=0)
        axes.axhline(0.5, color="white", linewidth=0.6, linestyle=(0, (2, 2)))
        axes.set_title(f"layer {layers[number]}", fontsize=8, pad=2)
        axes.set(xlim=(places[0], places[-1]), ylim=(0, 1), yticks=[0, 0.5, 1])
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.tick_params(labelsize=7)
        axes.grid(visible=False)
    figure.supxlabel("optimizer step", fontsize=9)
    figure.supylabel("share of tokens", fontsize=9)
    handles = [Patch(color=color, alpha=0.85) for color in _colors(experts)]
    names = [f"expert {number}" for number in range(experts)]
    figure.legend(handles, names, loc="outside upper left", ncols=min(experts, 4), handlelength=1)
    return figure


@style(small=True)
def plot_changes(changes: Sequence[float], metric: str) -> Figure:
    """How much each query gained or lost, as bars from the best gain to the worst loss."""
    title, across = "Change of each query", "queries, from the greatest gain to the greatest loss"
    figure, axes = _small_figure(title, across, f"{metric} after − before", whole_numbers=True)
    ordered = sorted(changes, reverse=True)
    axes.bar(range(1, len(ordered) + 1), ordered, width=1, color=[GREEN if c > 0 else VERMILLION for c in ordered])
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_xlim(0.5, len(ordered) + 0.5)
    return figure


@style(small=True)
def plot_before_after(before: Sequence[float], after: Sequence[float], metric: str) -> Figure:
    """Each query before and after training; queries at the same place make one larger point."""
    figure, axes = _small_figure("Before and after", f"{metric} before", f"{metric} after")
    places = Counter((round(x, 3), round(y, 3)) for x, y in zip(before, after, strict=True))
    colors = [GREEN if y > x else VERMILLION if y < x else GREY for x, y in places]
    most = max(places.values())
    # The area says how many; the greatest has a diameter of some 16 points.
    sizes = [12 + 200 * count / most for count in places.values()]
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=(0, (3, 3)), zorder=1)
    x, y = zip(*places, strict=True)
    axes.scatter(x, y, s=sizes, c=colors, alpha=0.6, linewidths=0, zorder=2)
    axes.set(xlim=(-0.08, 1.08), ylim=(-0.08, 1.08))
    axes.set_aspect("equal", adjustable="box")
    return figure


_SMALL = (3.75, 2.55)  # inches: 360 pixels wide on a page, so that its text is as large as the page's on a phone, too


def _small_figure(title: str, across: str, up: str, *, whole_numbers: bool = False) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=_SMALL, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", weight="bold")
    axes.set(xlabel=across, ylabel=up)
    if whole_numbers:
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return figure, axes


def _colors(count: int) -> list[str]:
    return [PALETTE[number % len(PALETTE)] for number in range(count)]


def svg(figure: Figure, label: str) -> str:
    """A figure as an ``<svg>`` element for a page: no background, lines and text in the page's own colour and font."""
    import matplotlib

    drawn = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = drawn.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    # Names that nothing refers to, which every figure has again.
    referred = set(re.findall(r"#([\w.-]+)", text))
    text = re.sub(r' id="([\w.-]+)"', lambda m: m[0] if m[1] in referred else "", text)
    for color in (INK, GREY):
        text = re.sub(color, "currentColor", text, flags=re.IGNORECASE)
    text = re.sub(PALE, "var(--rule)", text, flags=re.IGNORECASE)
    text = text.replace("'DejaVu Sans'", "system-ui")
    width, height = (72 * size for size in figure.get_size_inches())
    head = f'<svg role="img" aria-label="{html.escape(label)}" viewBox="0 0 {width:g} {height:g}" xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    return head + text[text.index(">") + 1 :]
