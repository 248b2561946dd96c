"""The command ``python -m clpl_moe.ablate``."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import Any

from clpl_moe.ablate import AblateArguments, ablate
from clpl_moe.common.cli import parse
from clpl_moe.common.errors import command


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    (arguments,) = parse(
        [AblateArguments],
        prog="clpl_moe.ablate",
        description="Train and evaluate rows of options on several languages and seeds; write the table that compares them.",
        argv=argv,
    )

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        if not ablate(arguments):
            sys.exit(1)
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    main()
