"""The command ``python -m clpl_moe.ablate``."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import Any

from clpl_moe.ablate import ablate
from clpl_moe.ablate.options import AblateArguments
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
        ablation = ablate(arguments)
    finally:
        signal.signal(signal.SIGTERM, before)
    for job, folder in ablation.to_do.items():
        print(f"to do: {job} ({folder})")
    print(f"\n{ablation}")
    if not arguments.dry_run:
        print(f"\nwrote {ablation.output}")
    for name, reason in ablation.failed.items():
        print(f"FAILED {name}: {reason}", file=sys.stderr)
    if ablation.failed:
        print("the same command goes on with what is missing", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
