"""The command ``python -m clpl_moe.export``."""

from clpl_moe.common.api import command_of
from clpl_moe.export import Exported, export


@command_of(
    export,
    "Write a model with a smaller vocabulary, as an ONNX graph or under the names of 2024, and upload it.",
    positional=("input", "output"),
)
def main(exported: Exported) -> None:
    print(exported)


if __name__ == "__main__":
    main()
