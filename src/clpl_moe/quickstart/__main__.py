"""The command ``python -m clpl_moe.quickstart``."""

from clpl_moe.common.api import command_of
from clpl_moe.common.cli import command_name
from clpl_moe.quickstart import Quickstart, quickstart


@command_of(quickstart, "Train a small encoder on the Korean sample, on a CPU, and show nDCG before and after.")
def main(done: Quickstart) -> None:
    print(f"\nKorean dev questions, before and after:\n{done}\n\ntrained model: {done.model}")
    print(f"Next, with data of your own: {command_name('clpl_moe.prepare')} --help")


if __name__ == "__main__":
    main()
