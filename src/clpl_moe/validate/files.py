"""Every fault of every line of a training file, by the check that training uses."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from clpl_moe.common.errors import UserError, at
from clpl_moe.common.files import read_lines
from clpl_moe.data.schema import check_line
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


def validate_file(path: str | Path, reading: Reading, max_faults: int = 50) -> FileReport:
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
