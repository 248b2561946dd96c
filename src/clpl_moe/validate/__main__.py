"""The command ``python -m clpl_moe.validate``."""

from __future__ import annotations

from collections.abc import Sequence

from clpl_moe.common.cli import parse
from clpl_moe.common.errors import UserError, command
from clpl_moe.validate import DESCRIPTION, PROG, ValidateArguments, validate


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    (arguments,) = parse([ValidateArguments], PROG, DESCRIPTION, argv, positional="train_data")
    faults = validate(arguments)
    if faults:
        raise UserError(f"{faults:,} fault{'s' * (faults > 1)}: training would refuse these data")


if __name__ == "__main__":
    main()
