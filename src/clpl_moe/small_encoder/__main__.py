"""The command ``python -m clpl_moe.small_encoder``."""

from __future__ import annotations

from collections.abc import Sequence

from clpl_moe.common.cli import command_name, parse
from clpl_moe.common.errors import command
from clpl_moe.small_encoder import small_encoder
from clpl_moe.small_encoder.options import SmallEncoderArguments


@command
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    (arguments,) = parse(
        [SmallEncoderArguments],
        prog="clpl_moe.small_encoder",
        description="Write a small multilingual encoder for a CPU: multilingual-e5-small as an XLM-R model.",
        argv=argv,
    )
    folder = small_encoder(arguments)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files) / 1e6
    print(f"Wrote {folder} ({size:.0f} MB): {', '.join(str(path.relative_to(folder)) for path in files)}")
    print(f"Next: {command_name('clpl_moe.train')} --config quickstart --model_name_or_path {folder}")


if __name__ == "__main__":
    main()
