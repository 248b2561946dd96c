"""The report of a training file: its faults, by the check that training uses, and figures of the lines without fault."""

from __future__ import annotations

import sys
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from clpl_moe.common.errors import UserError, at
from clpl_moe.common.files import read_lines
from clpl_moe.data.schema import check_line, normalise
from clpl_moe.data.scripts import script_of
from clpl_moe.retrieval.collection import normalize_text
from clpl_moe.validate.reading import KINDS, Reading

_BLOCK = 1 << 20  # characters whose tokens and scripts are counted at once


class Figures:
    """Counts, repeats, lengths and scripts of the lines without fault of one file."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.examples = 0
        self.answered = 0  # negatives with queries
        self.per_query: dict[str, array] = {kind: array("I") for kind in ("pos", "neg")}  # how many each line has
        self.repeats: Counter[str] = Counter()  # name of a repetition -> how often
        self.first: dict[str, int] = {}  # name of a repetition -> number of the first line with it
        self.lengths: dict[str, array] = {kind: array("I") for kind in KINDS}
        self._known_lengths: dict[str, dict[int, int]] = {kind: {} for kind in KINDS}
        self._characters: dict[str, np.ndarray] = {kind: np.zeros(0, dtype=np.int64) for kind in KINDS}
        self._lines: set[int] = set()
        self._positives_of: dict[int, int] = {}
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
        positives = frozenset(map(normalize_text, example["pos"]))
        answered = map(tuple, example["negative_queries"])
        line = hash((*map(tuple, (*texts.values(), answered)), example["prompt"], example["type"]))
        answers = hash(positives)
        other = self._positives_of.setdefault(hash(normalize_text(example["query"])), answers) != answers
        for name, times in (
            ("equal lines", line in self._lines),
            ("equal queries with other positives", other),
            ("negatives that equal a positive", sum(normalize_text(text) in positives for text in example["neg"])),
        ):
            self.repeats[name] += times
            if times:
                self.first.setdefault(name, number)
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


def validate_file(path: str | Path, reading: Reading, max_faults: int = sys.maxsize) -> FileReport:
    """Check one file to its end; ``max_faults`` limits the messages that are kept."""
    path = Path(path)
    report, figures = FileReport(path), Figures(reading)
    size = path.stat().st_size if path.is_file() else None
    with tqdm(total=size, desc=path.name, unit="B", unit_scale=True, delay=2) as bar:
        try:
            for number, _, raw in read_lines(path):
                record, faults = check_line(number, raw, scores_required=reading.scores_required)
                report.messages += [f"{at(path, number)}: {fault}" for fault in faults]
                del report.messages[max_faults:]
                report.faults += len(faults)
                report.faulty_lines += bool(faults)
                if record is not None and not faults:
                    figures.add(number, record)
                bar.update(len(raw))
        except UserError as error:
            return FileReport(path, 1, messages=[str(error)])
        figures.flush()
    report.figures = figures
    return report
