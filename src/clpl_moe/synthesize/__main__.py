"""The command ``python -m clpl_moe.synthesize``."""

from __future__ import annotations

from collections.abc import Sequence

from clpl_moe.common.cli import parse
from clpl_moe.common.errors import command
from clpl_moe.retrieval.options import EncodingArguments
from clpl_moe.synthesize import SynthesizeArguments, synthesize


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    arguments, encoding = parse(
        [SynthesizeArguments, EncodingArguments],
        prog="clpl_moe.synthesize",
        description="Have a language model write queries for the negatives of training data that have none.",
        argv=argv,
    )
    synthesize(arguments, encoding)


if __name__ == "__main__":
    main()
