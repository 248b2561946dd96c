"""The command ``python -m clpl_moe.encode``."""

from clpl_moe.common.api import command_of
from clpl_moe.encode import Encoded, encode


@command_of(encode, "Encode corpora ahead of mine and evaluate, on as many machines as one likes.")
def main(found: dict[str, Encoded]) -> None:
    for language, one in found.items():
        print(f"{language}: {one.passages:,} passages in {one.folder}, {one.encoded:,} encoded here")


if __name__ == "__main__":
    main()
