"""The command ``python -m clpl_moe.evaluate``."""

from __future__ import annotations

from collections.abc import Sequence

from clpl_moe.common.cli import parse
from clpl_moe.common.errors import command
from clpl_moe.evaluate import evaluate
from clpl_moe.evaluate.options import EvaluateArguments
from clpl_moe.retrieval.options import EncodingArguments


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    arguments, encoding = parse(
        [EvaluateArguments, EncodingArguments],
        prog="clpl_moe.evaluate",
        description="Retrieve from collections with one or more models; write run files, metrics and comparisons.",
        argv=argv,
    )
    evaluation = evaluate(arguments, encoding)
    if evaluation.results:  # of several processes only the first one has them
        print(f"{evaluation}\n\nvalues of each query: {evaluation.table}")


if __name__ == "__main__":
    main()
