"""Checking training files: every fault of every line, by the check that training uses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from clpl_moe.common.errors import UserError, at
from clpl_moe.common.files import read_lines
from clpl_moe.data.schema import check_line, data_files
from clpl_moe.validate.figures import Figures
from clpl_moe.validate.reading import Reading


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


def validate_files(paths: Sequence[str], reading: Reading, max_faults: int | None = None) -> Iterator[FileReport]:
    """A report of each file as it is done; ``max_faults`` limits the messages of each."""
    for path in paths:
        try:
            files = data_files([path])
        except UserError as error:
            yield FileReport(Path(path), 1, messages=[str(error)])
            continue
        for file in files:
            yield validate_file(file, reading, max_faults)


def validate_file(path: str | Path, reading: Reading, max_faults: int | None = None) -> FileReport:
    """Check one file to its end.

    Args:
        path: a file of training JSONL.
        reading: how training reads it.
        max_faults: faults whose messages are kept; None: all.
    """
    path = Path(path)
    report, figures = FileReport(path), Figures(reading)
    size = path.stat().st_size if path.is_file() else None
    with tqdm(total=size, desc=path.name, unit="B", unit_scale=True, delay=2) as bar:
        try:
            for number, _, raw in read_lines(path):
                record, faults = check_line(number, raw, scores_required=reading.scores_required)
                room = None if max_faults is None else max(0, max_faults - len(report.messages))
                report.messages += [f"{at(path, number)}: {fault}" for fault in faults[:room]]
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
