"""The command ``python -m clpl_moe.quickstart``."""

from __future__ import annotations

from collections.abc import Sequence

from clpl_moe.common.cli import command_name, parse
from clpl_moe.common.errors import command
from clpl_moe.quickstart import quickstart
from clpl_moe.quickstart.options import QuickstartArguments


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    (arguments,) = parse(
        [QuickstartArguments],
        prog="clpl_moe.quickstart",
        description="Train a small encoder on the Korean sample, on a CPU, and show nDCG before and after.",
        argv=argv,
    )
    done = quickstart(arguments)
    print(f"\nKorean dev questions, before and after:\n{done}\n\ntrained model: {done.model}")
    print(f"Next, with data of your own: {command_name('clpl_moe.prepare')} --help")


if __name__ == "__main__":
    main()
