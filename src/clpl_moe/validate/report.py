"""The report of a training file: its faults, by the check that training uses, figures of the lines without fault, and the
table that shows them."""

from __future__ import annotations

import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from clpl_moe.common.errors import UserError
from clpl_moe.data.formats import DataFile
from clpl_moe.data.lengths import cut_off, percent
from clpl_moe.data.schema import checked_lines, normalise
from clpl_moe.data.scripts import script_of
from clpl_moe.validate.answers import Answers
from clpl_moe.validate.reading import KINDS, Reading

_BLOCK = 1 << 20  # characters whose tokens and scripts are counted at once


class Figures:
    """Counts, repeats, lengths and scripts of the lines without fault of one file."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.examples = 0
        self.answered = 0  # negatives with queries
        self.per_query: dict[str, array] = {kind: array("I") for kind in ("pos", "neg")}  # how many each line has
        self.answers = Answers()
        self.equal_lines = 0
        self.first_equal_line: int | None = None
        self.lengths: dict[str, array] = {kind: array("I") for kind in KINDS}
        self._known_lengths: dict[str, dict[int, int]] = {kind: {} for kind in KINDS}
        self._characters: dict[str, np.ndarray] = {kind: np.zeros(0, dtype=np.int64) for kind in KINDS}
        self._lines: set[int] = set()
        self._texts: dict[str, list[str]] = {kind: [] for kind in KINDS}
        self._waiting = 0

    def add(self, number: int, record: dict[str, Any]) -> None:
        """Take in a line without faults."""
        example = normalise(record)
        self.examples += 1
        negative_queries = [query for queries in example["negative_queries"] for query in queries]
        texts = dict(zip(KINDS, ([example["query"]], example["pos"], example["neg"], negative_queries)))
        for kind, some in texts.items():
            self._texts[kind] += some
            self._waiting += sum(map(len, some))
        for kind, counts in self.per_query.items():
            counts.append(len(texts[kind]))
        self.answered += sum(map(bool, example["negative_queries"]))
        answered = map(tuple, example["negative_queries"])
        line = hash((*map(tuple, (*texts.values(), answered)), example["prompt"], example["type"]))
        if line in self._lines:
            self.equal_lines += 1
            self.first_equal_line = self.first_equal_line or number
        self.answers.add(number, example)
        self._lines.add(line)
        if self._waiting >= _BLOCK:
            self.flush()

    def flush(self) -> None:
        """Count what was taken in since the last time; before the figures of texts are read."""
        for kind, texts in self._texts.items():
            self.lengths[kind].extend(self._measure(kind, texts))
            codes = np.frombuffer("".join(texts).encode("utf-32-le"), dtype=np.uint32)
            before = self._characters[kind]  # how often each code point occurs
            self._characters[kind] = np.bincount(codes, minlength=len(before))
            self._characters[kind][: len(before)] += before
            texts.clear()
        self._waiting = 0

    def _measure(self, kind: str, texts: list[str]) -> Iterable[int]:
        if self.reading.count is None:
            return map(len, texts)
        # Passages are negatives of many queries: each is cut into tokens once.
        known = self._known_lengths[kind]
        new = {key: text for text in texts if (key := hash(text)) not in known}
        if new:
            prompt = self.reading.prompts[kind]
            known.update(zip(new, self.reading.count([prompt + text for text in new.values()])))
        return (known[hash(text)] for text in texts)

    @property
    def letters(self) -> dict[str, Counter[str]]:
        """Kind of text -> script -> number of letters."""
        letters: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
        for kind, counts in self._characters.items():
            for code in np.flatnonzero(counts):
                if script := script_of(chr(code)):
                    letters[kind][script] += int(counts[code])
        return letters


@dataclass
class FileReport:
    """What is wrong with one file, and what it is like.

    Attributes:
        path: of the file.
        faults: number of faults; 1 for a file that cannot be read.
        faulty_lines: number of lines that have some.
        messages: the first faults, as ``file:line: field: what was found, what is expected``.
        figures: of the lines without fault; None for a file that cannot be read.
    """

    path: Path
    faults: int = 0
    faulty_lines: int = 0
    messages: list[str] = field(default_factory=list)
    figures: Figures | None = None


def validate_file(file: DataFile | str | Path, reading: Reading, max_faults: int = sys.maxsize) -> FileReport:
    """Check one file to its end; ``max_faults`` limits the messages that are kept."""
    if not isinstance(file, DataFile):
        file = DataFile(str(file), str(file))
    path = Path(file.name)
    report, figures = FileReport(path), Figures(reading)
    with tqdm(total=file.size, desc=path.name, unit="B", unit_scale=True, delay=2) as bar:
        try:
            for line in checked_lines(file, scores_required=reading.scores_required):
                report.messages += [f"{line.place}: {fault}" for fault in line.faults]
                del report.messages[max_faults:]
                report.faults += len(line.faults)
                report.faulty_lines += bool(line.faults)
                if line.record is not None and not line.faults:
                    figures.add(line.number, line.record)
                bar.update(line.size)
        except UserError as error:
            return FileReport(path, 1, messages=[str(error)])
        figures.flush()
        figures.answers.close()
    report.figures = figures
    return report


def table(report: FileReport) -> Iterator[str]:
    """The figures of a file, line by line; nothing of one that could not be read."""
    figures = report.figures
    if figures is None:
        return
    rows = {"examples": f"{figures.examples:,}", "faults": f"{report.faults:,}"}
    if report.faults:
        lines = f"{report.faulty_lines:,} line{'s' * (report.faulty_lines != 1)}"
        rows["faults"] += f" in {lines}, which the rest of this table leaves out"
    if figures.examples:
        for kind, name in (("pos", "positives"), ("neg", "negatives")):
            counts = np.array(figures.per_query[kind])
            rows[f"{name} per query"] = f"{counts.min():,} to {counts.max():,}, mean {counts.mean():.1f}"
        negatives = sum(figures.per_query["neg"])
        rows["negatives with queries"] = f"{percent(figures.answered, negatives)} of {negatives:,}"
        first = f", first in line {figures.first_equal_line:,}" if figures.first_equal_line else ""
        rows |= {"equal lines": f"{figures.equal_lines:,}{first}", **dict(figures.answers.rows())}
    width = max(map(len, rows))
    yield from (f"  {name:<{width}}  {value}" for name, value in rows.items())
    if figures.examples:
        yield ""
        yield from _table_of_texts(figures)


def _table_of_texts(figures: Figures) -> Iterator[str]:
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
            texts, tokens = cut_off(lengths, limit)
            cut[1:] = [percent(texts, len(lengths)), percent(tokens, int(lengths.sum()))]
        total = letters[kind].total()
        scripts = [f"{name} {percent(count, total)}" for name, count in letters[kind].most_common(4)]
        median, high = np.percentile(lengths, [50, 95])
        shape = [f"{lengths.mean():.1f}", f"{median:.0f}", f"{high:.0f}", f"{lengths.max():,}"]
        rows.append([kind, f"{len(lengths):,}", *shape, *cut, ", ".join(scripts) or "no letters"])
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:-1], widths[1:-1])]
        yield f"  {row[0]:<{widths[0]}}  {'  '.join(cells)}  {row[-1]}"
