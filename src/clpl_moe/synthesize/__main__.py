"""The command ``python -m clpl_moe.synthesize``."""

from collections.abc import Mapping

from clpl_moe.common.api import command_of
from clpl_moe.common.cli import print_counts
from clpl_moe.synthesize import Synthesized, synthesize


def _print_plan(plan: Mapping[str, int]) -> None:
    print_counts(plan)
    print("(a token is counted as 4 bytes; a passage whose answer is of no use is asked about twice)", flush=True)


_DESCRIPTION = "Have a language model write queries for the negatives of training data that have none."


@command_of(synthesize, _DESCRIPTION, planned=_print_plan)
def main(done: Synthesized) -> None:
    if done.counts:
        print()
        print_counts(done.counts)
    for path in done.paths:
        print(f"wrote {path}")
    if done.unanswered:
        print(f"{done.unanswered} passages had no answer: the same command with overwrite set asks about these again")


if __name__ == "__main__":
    main()
