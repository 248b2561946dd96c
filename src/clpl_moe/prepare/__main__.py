"""The command ``python -m clpl_moe.prepare``."""

from __future__ import annotations

from collections.abc import Sequence

from clpl_moe.common.cli import parse, print_counts
from clpl_moe.common.errors import command
from clpl_moe.prepare import prepare
from clpl_moe.prepare.options import prepare_arguments


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    (arguments,) = parse(
        [prepare_arguments()],
        prog="clpl_moe.prepare",
        description="Turn SQuAD-shaped files, MIRACL or a folder in BEIR's layout into a retrieval collection.",
        argv=argv,
    )
    prepared = prepare(arguments)
    print_counts(prepared.counts)
    print(f"wrote {prepared.folder}{prepared.note}")


if __name__ == "__main__":
    main()
