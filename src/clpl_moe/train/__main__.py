"""The command ``python -m clpl_moe.train``."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Sequence

from clpl_moe.common.cli import look_up, parse
from clpl_moe.common.errors import command
from clpl_moe.common.output import is_first_process, writing
from clpl_moe.train import all_options, train
from clpl_moe.train.help import help_text

PROG = "clpl_moe.train"
DESCRIPTION = "Fine-tune an encoder for retrieval with contrastive learning penalty loss and mixture-of-experts layers."


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if {"-h", "--help"} & set(argv):
        print(help_text(PROG, DESCRIPTION), end="")
        return
    first = is_first_process()
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING if first else logging.ERROR)
    folder = look_up("output_dir", argv) if (look_up("dry_run", argv) or "false").lower() == "false" else None
    # Taken before the options, which alone take seconds to load.
    with writing(folder, inside=True) if folder else contextlib.nullcontext():
        result = train(*parse(all_options(), PROG, DESCRIPTION, argv), on_plan=lambda plan: print(plan, flush=True))
    if first:
        print(result)


if __name__ == "__main__":
    main()
