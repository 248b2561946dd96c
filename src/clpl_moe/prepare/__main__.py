"""The command ``python -m clpl_moe.prepare``."""

from clpl_moe.common.api import command_of
from clpl_moe.common.cli import print_counts
from clpl_moe.prepare import Prepared, prepare


@command_of(prepare, "Turn SQuAD-shaped files, MIRACL or a folder in BEIR's layout into a retrieval collection.")
def main(prepared: Prepared) -> None:
    print_counts(prepared.counts)
    print(f"wrote {prepared.folder}{prepared.note}")


if __name__ == "__main__":
    main()
