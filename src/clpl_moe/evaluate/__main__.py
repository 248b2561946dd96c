"""The command ``python -m clpl_moe.evaluate``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clpl_moe.common.cli import parse
from clpl_moe.common.errors import command
from clpl_moe.evaluate import _TEST, TABLE_FILE, EvaluateArguments, evaluate, format_comparisons, format_table
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
    from clpl_moe.retrieval.store import processes

    with processes() as first:
        evaluation = evaluate(arguments, encoding)
    if not first:
        return
    print(format_table(evaluation.results))
    if evaluation.comparisons:
        print(f"\n{format_comparisons(evaluation.comparisons)}\n{_TEST}")
    print(f"\nvalues of each query: {Path(arguments.output, TABLE_FILE)}")


if __name__ == "__main__":
    main()
