"""The command ``python -m clpl_moe.validate``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from clpl_moe.common.cli import parse
from clpl_moe.common.errors import UserError, command
from clpl_moe.validate import FileReport, validate
from clpl_moe.validate.options import ValidateArguments
from clpl_moe.validate.table import table


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    (arguments,) = parse(
        [ValidateArguments],
        prog="clpl_moe.validate",
        description="Show every fault of training data, and a table of what the data are like. Exit code 2 on faults.",
        argv=argv,
        positional="train_data",
    )
    if faults := validate(arguments, done=_print).faults:
        raise UserError(f"{faults:,} fault{'s' * (faults > 1)}: training would refuse these data")


def _print(report: FileReport) -> None:
    for message in report.messages:
        print(message, file=sys.stderr)
    if rest := report.faults - len(report.messages):
        print(f"{report.path}: {rest:,} more faults; set max_faults to see more of them", file=sys.stderr)
    if report.figures is not None:
        print(f"{report.path}\n" + "\n".join(table(report)) + "\n")


if __name__ == "__main__":
    main()
