"""The command ``python -m clpl_moe.check``."""

from clpl_moe.check import Checked, check
from clpl_moe.common.api import command_of
from clpl_moe.common.errors import UserError

_DESCRIPTION = "Show whether other tools give a model folder's own embeddings, and with which call. Exit code 2 if not."


@command_of(check, _DESCRIPTION, positional=("folder",))
def main(checked: Checked) -> None:
    print(checked)
    if wrong := checked.wrong:
        raise UserError(f"other embeddings than ours, or none: {', '.join(tool.tool for tool in wrong)}")


if __name__ == "__main__":
    main()
