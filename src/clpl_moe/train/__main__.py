"""The command ``python -m clpl_moe.train``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from clpl_moe.common.errors import command
from clpl_moe.train import HELP_FILE, train


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if {"-h", "--help"} & set(argv):
        print(HELP_FILE.read_text(encoding="utf-8"), end="")
        return
    train(argv)


if __name__ == "__main__":
    main()
