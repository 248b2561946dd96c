"""The command ``python -m clpl_moe.card``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clpl_moe.common.cli import parse
from clpl_moe.common.errors import command
from clpl_moe.report.card import card
from clpl_moe.report.options import CardArguments


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    description = "Put results of clpl_moe.evaluate into the model card of a run."
    (arguments,) = parse([CardArguments], prog="clpl_moe.card", description=description, argv=argv)
    results = card(arguments)
    print(f"wrote {Path(arguments.run, 'README.md')}: results on {', '.join(r.language for r in results)}")


if __name__ == "__main__":
    main()
