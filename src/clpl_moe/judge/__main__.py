"""The command ``python -m clpl_moe.judge``."""

from collections.abc import Mapping

from clpl_moe.common.api import command_of
from clpl_moe.common.cli import print_counts
from clpl_moe.common.errors import shorten
from clpl_moe.judge import Judged, judge


def _print_plan(plan: Mapping[str, int]) -> None:
    print_counts(plan)
    print("(a token is counted as 4 bytes; a passage without a verdict is asked about twice)", flush=True)


_DESCRIPTION = "Have a language model judge the negatives of training data: what answers its query is no negative."


@command_of(judge, _DESCRIPTION, planned=_print_plan)
def main(done: Judged) -> None:
    if done.counts:
        print()
        print_counts(done.counts)
    for example in done.examples:
        query, passage = (shorten(" ".join(text.split()), 200) for text in (example.query, example.passage))
        print(f"\n{example.what}\n  query:   {query}\n  passage: {passage}")
    for path in done.paths:
        print(f"wrote {path}")
    if done.unanswered:
        print(f"{done.unanswered} questions had no answer: the same command with overwrite set asks these again")


if __name__ == "__main__":
    main()
