"""The command ``python -m clpl_moe.card``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clpl_moe.common.cli import parse
from clpl_moe.common.errors import command
from clpl_moe.report.card import CardArguments, read_results


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    (arguments,) = parse(
        [CardArguments],
        prog="clpl_moe.card",
        description="Put results of clpl_moe.evaluate into the model card of a run.",
        argv=argv,
    )
    from clpl_moe.train.card import add_results

    results = read_results(arguments.after, arguments.before)
    add_results(arguments.run, results)
    print(f"wrote {Path(arguments.run, 'README.md')}: results on {', '.join(r.language for r in results)}")


if __name__ == "__main__":
    main()
