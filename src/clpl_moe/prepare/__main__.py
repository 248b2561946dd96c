"""The command ``python -m clpl_moe.prepare``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clpl_moe.common.cli import parse, print_counts
from clpl_moe.common.errors import command
from clpl_moe.common.files import refuse_existing
from clpl_moe.prepare import PrepareArguments, prepare, refuse_own_source


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    (arguments,) = parse(
        [PrepareArguments],
        prog="clpl_moe.prepare",
        description="Turn SQuAD-shaped files, MIRACL or a folder in BEIR's layout into a retrieval collection.",
        argv=argv,
    )
    folder = Path(arguments.output) / arguments.language
    refuse_own_source(arguments, folder)
    refuse_existing(folder, arguments.overwrite, marker="corpus.jsonl")
    counts = prepare(arguments, folder)
    print_counts(counts)
    note = "; dev questions are in none of the files that training reads" if arguments.squad is not None else ""
    print(f"wrote {folder}{note}")


if __name__ == "__main__":
    main()
