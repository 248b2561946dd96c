"""The command ``python -m clpl_moe.convert``."""

from clpl_moe.common.api import command_of
from clpl_moe.common.cli import print_counts
from clpl_moe.convert import Converted, convert


@command_of(convert, "Write training data or a collection in the format of another tool.")
def main(converted: Converted) -> None:
    print_counts(converted.counts)
    print(f"wrote {converted.path}")


if __name__ == "__main__":
    main()
