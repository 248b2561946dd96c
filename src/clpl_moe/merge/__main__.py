"""The command ``python -m clpl_moe.merge``."""

from clpl_moe.common.api import command_of
from clpl_moe.merge import Merged, merge


@command_of(
    merge,
    "Merge experts into dense layers, and a tuned model with its base model; the result loads everywhere.",
    positional=("input", "output"),
)
def main(merged: Merged) -> None:
    print(merged)


if __name__ == "__main__":
    main()
