"""The command ``python -m clpl_moe.synthesize``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from clpl_moe.common.cli import parse, print_counts
from clpl_moe.common.errors import command
from clpl_moe.retrieval.options import EncodingArguments
from clpl_moe.synthesize import synthesize
from clpl_moe.synthesize.options import SynthesizeArguments


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    arguments, encoding = parse(
        [SynthesizeArguments, EncodingArguments],
        prog="clpl_moe.synthesize",
        description="Have a language model write queries for the negatives of training data that have none.",
        argv=argv,
    )
    done = synthesize(arguments, encoding, planned=_print_plan)
    if done.counts:
        print()
        print_counts(done.counts)
    for path in done.paths:
        print(f"wrote {path}")
    if done.unanswered:
        print(f"{done.unanswered} passages had no answer: the same command with overwrite set asks about these again")


def _print_plan(plan: Mapping[str, int]) -> None:
    print_counts(plan)
    print("(a token is counted as 4 bytes; a passage whose answer is of no use is asked about twice)", flush=True)


if __name__ == "__main__":
    main()
