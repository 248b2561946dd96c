"""The command ``python -m clpl_moe.ablate``."""

import signal
import sys

from clpl_moe.ablate import Ablation, ablate
from clpl_moe.common.api import command_of

_DESCRIPTION = "Train and evaluate rows of options on several languages and seeds; write a table that compares them."


@command_of(ablate, _DESCRIPTION)
def main(ablation: Ablation) -> None:
    for job, folder in ablation.to_do.items():
        print(f"to do: {job} ({folder})")
    print(f"\n{ablation}")
    if ablation.written:
        print(f"\nwrote {ablation.output}")
    for name, reason in ablation.failed.items():
        print(f"FAILED {name}: {reason}", file=sys.stderr)
    if ablation.failed:
        print("the same command goes on with what is missing", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the runs' processes end, too
    main()
