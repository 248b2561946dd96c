"""The command ``python -m clpl_moe.report``."""

from __future__ import annotations

from collections.abc import Sequence

from clpl_moe.common.cli import parse
from clpl_moe.common.errors import command
from clpl_moe.report import report
from clpl_moe.report.options import ReportArguments


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    (arguments,) = parse(
        [ReportArguments],
        prog="clpl_moe.report",
        description="Make a page of runs: their course, and what they changed for each query.",
        argv=argv,
        positional="runs",
    )
    print(f"wrote {report(arguments)}")


if __name__ == "__main__":
    main()
