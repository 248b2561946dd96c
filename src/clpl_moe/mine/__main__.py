"""The command ``python -m clpl_moe.mine``."""

from clpl_moe.common.api import command_of
from clpl_moe.common.cli import print_counts
from clpl_moe.mine import Mined, mine


@command_of(mine, "Mine hard negatives and the queries that they are known to answer: training data.")
def main(mined: Mined | None) -> None:
    if mined is not None:  # of several processes only the first one has it
        print_counts(mined.counts)
        print(f"wrote {mined.path}")


if __name__ == "__main__":
    main()
