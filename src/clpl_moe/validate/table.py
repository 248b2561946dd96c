"""The table that ``validate`` shows of a file."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from clpl_moe.validate.reading import KINDS
from clpl_moe.validate.report import Figures, FileReport


def table(report: FileReport) -> Iterator[str]:
    """The figures of a file, line by line; nothing of one that could not be read."""
    figures = report.figures
    if figures is None:
        return
    rows = {"examples": f"{figures.examples:,}", "faults": f"{report.faults:,}"}
    if report.faults:
        rows["faults"] += f" in {report.faulty_lines:,} lines, which the rest of this table leaves out"
    if figures.examples:
        for kind, name in (("pos", "positives"), ("neg", "negatives")):
            counts = np.array(figures.per_query[kind])
            rows[f"{name} per query"] = f"{counts.min():,} to {counts.max():,}, mean {counts.mean():.1f}"
        negatives = sum(figures.per_query["neg"])
        rows["negatives with queries"] = f"{_share(figures.answered, negatives)} of {negatives:,}"
        for name, times in figures.repeats.items():
            first = f", first in line {figures.first[name]:,}" if name in figures.first else ""
            rows[name] = f"{times:,}{first}"
    width = max(map(len, rows))
    yield from (f"  {name:<{width}}  {value}" for name, value in rows.items())
    if figures.examples:
        yield ""
        yield from _texts(figures)


def _texts(figures: Figures) -> Iterator[str]:
    """Lengths and scripts, a line for each kind of text."""
    unit = "characters" if figures.reading.count is None else "tokens"
    letters = figures.letters
    rows = [
        ["texts", "number", f"{unit}: mean", "median", "95%", "longest", "limit", "cut", "tokens cut off", "scripts"]
    ]
    for kind in KINDS:
        lengths, limit = np.array(figures.lengths[kind], dtype=np.int64), figures.reading.limits[kind]
        if not len(lengths):
            rows.append([kind, "0", *["-"] * 8])
            continue
        cut = ["-", "-", "-"] if limit is None else [f"{limit:,}", "?", "?"]
        if limit is not None and figures.reading.count is not None:
            over = np.maximum(lengths - limit, 0)
            cut[1:] = [_share(int(np.count_nonzero(over)), len(over)), _share(int(over.sum()), int(lengths.sum()))]
        total = letters[kind].total()
        scripts = [f"{name} {_share(count, total)}" for name, count in letters[kind].most_common(4)]
        median, high = np.percentile(lengths, [50, 95])
        shape = [f"{lengths.mean():.1f}", f"{median:.0f}", f"{high:.0f}", f"{lengths.max():,}"]
        rows.append([kind, f"{len(lengths):,}", *shape, *cut, ", ".join(scripts) or "no letters"])
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:-1], widths[1:-1])]
        yield f"  {row[0]:<{widths[0]}}  {'  '.join(cells)}  {row[-1]}"


def _share(part: int, whole: int) -> str:
    if not whole:
        return "0%"
    percent = 100 * part / whole
    # A small share is not shown as 0%, nor a large one as 100%.
    return f"{percent:.0f}%" if percent in (0, 100) else f"{min(max(percent, 0.1), 99.9):.1f}%"
