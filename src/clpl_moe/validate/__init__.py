"""Validate training data: every fault, and what the data are like.

A fault is something for which training refuses a file: both call :func:`clpl_moe.data.schema.checked_lines`. Of the lines
without fault come

1. how many positives and negatives a query has, and how many negatives have queries;
2. equal lines (in what training reads of them), and negatives that are none: what a positive equals, and what any line, also
   of another file, knows to answer the query (:mod:`clpl_moe.validate.answers`);
3. lengths, in tokens of a tokenizer with prompts and special tokens as in training, and what the limits cut off;
   without a tokenizer in characters;
4. the scripts of the letters, by Unicode's names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from clpl_moe.common.api import takes_options
from clpl_moe.common.errors import UserError
from clpl_moe.data.formats import data_files
from clpl_moe.validate.answers import answers_in_other_files
from clpl_moe.validate.options import ValidateArguments
from clpl_moe.validate.reading import open_reading
from clpl_moe.validate.report import FileReport, validate_file

__all__ = ["FileReport", "Validation", "validate"]


@dataclass
class Validation:
    """What was found, file by file."""

    files: list[FileReport] = field(default_factory=list)

    @property
    def faults(self) -> int:
        """Of all files; training takes the data where there is none."""
        return sum(report.faults for report in self.files)

    @property
    def answers_in_other_files(self) -> int:
        """How many negatives only another file knows to answer their query."""
        return answers_in_other_files([report.figures.answers for report in self.files if report.figures is not None])


@takes_options(ValidateArguments)
def validate(arguments: ValidateArguments, done: Callable[[FileReport], None] | None = None) -> Validation:
    """Check every line of every file. Faults of the data are in the result; none raises an error.

    ``done`` is called with each file's report as soon as it is there.

    Raises:
        UserError: the options cannot be used, the config is one that training refuses, or there is no such tokenizer.
    """
    paths, reading = open_reading(arguments)
    found = Validation()
    for path in paths:
        try:
            reports: Iterable[FileReport] = (
                validate_file(file, reading, arguments.max_faults) for file in data_files([path])
            )
        except UserError as error:
            reports = [FileReport(Path(path), 1, messages=[str(error)])]
        for report in reports:
            found.files.append(report)
            if done is not None:
                done(report)
    return found
