"""The command ``python -m clpl_moe.report``."""

from pathlib import Path

from clpl_moe.common.api import command_of
from clpl_moe.report import report


@command_of(report, "Make a page of runs: their course, and what they changed for each query.", positional="runs")
def main(page: Path) -> None:
    print(f"wrote {page}")


if __name__ == "__main__":
    main()
