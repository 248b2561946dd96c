"""The command ``python -m clpl_moe.small_encoder``."""

from __future__ import annotations

from clpl_moe.common.cli import command_name, parse
from clpl_moe.common.errors import command
from clpl_moe.small_encoder import SmallEncoderArguments, build_small_encoder


@command
def main(argv: list[str] | None = None) -> None:
    """Run ``python -m clpl_moe.small_encoder``."""
    (args,) = parse(
        [SmallEncoderArguments],
        prog="clpl_moe.small_encoder",
        description="Write a small multilingual encoder for a CPU: multilingual-e5-small as an XLM-R model.",
        argv=argv,
    )
    folder = build_small_encoder(args.output, args.source, args.overwrite)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files) / 1e6
    print(f"Wrote {folder} ({size:.0f} MB): {', '.join(str(path.relative_to(folder)) for path in files)}")
    print(f"Next: {command_name('clpl_moe.train')} --config quickstart --model_name_or_path {folder}")


if __name__ == "__main__":
    main()
