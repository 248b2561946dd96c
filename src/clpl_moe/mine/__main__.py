"""The command ``python -m clpl_moe.mine``."""

from __future__ import annotations

from collections.abc import Sequence

from clpl_moe.common.cli import parse, print_counts
from clpl_moe.common.errors import command
from clpl_moe.mine import mine
from clpl_moe.mine.options import MineArguments, SelectionArguments
from clpl_moe.retrieval.options import EncodingArguments


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    options = parse(
        [MineArguments, SelectionArguments, EncodingArguments],
        prog="clpl_moe.mine",
        description="Mine hard negatives and the queries that they are known to answer: training data.",
        argv=argv,
    )
    if (mined := mine(*options)) is not None:
        print_counts(mined.counts)
        print(f"wrote {mined.path}")


if __name__ == "__main__":
    main()
