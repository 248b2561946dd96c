"""The command ``python -m clpl_moe.validate``."""

import sys

from clpl_moe.common.api import command_of
from clpl_moe.common.errors import UserError
from clpl_moe.validate import FileReport, Validation, validate
from clpl_moe.validate.report import table


def _print(report: FileReport) -> None:
    for message in report.messages:
        print(message, file=sys.stderr)
    if rest := report.faults - len(report.messages):
        print(f"{report.path}: {rest:,} more faults; set max_faults to see more of them", file=sys.stderr)
    if report.figures is not None:
        print(f"{report.path}\n" + "\n".join(table(report)) + "\n")


_DESCRIPTION = "Show every fault of training data, and a table of what the data are like. Exit code 2 on faults."


@command_of(validate, _DESCRIPTION, positional="train_data", done=_print)
def main(validation: Validation) -> None:
    if found := validation.answers_in_other_files:
        print(f"negatives that another file knows to answer their query: {found:,}")
    if faults := validation.faults:
        raise UserError(f"{faults:,} fault{'s' * (faults > 1)}: training would refuse these data")


if __name__ == "__main__":
    main()
