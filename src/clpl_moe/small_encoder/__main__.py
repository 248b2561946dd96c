"""The command ``python -m clpl_moe.small_encoder``."""

from pathlib import Path

from clpl_moe.common.api import command_of
from clpl_moe.common.cli import command_name
from clpl_moe.small_encoder import small_encoder


@command_of(small_encoder, "Write a small multilingual encoder for a CPU: multilingual-e5-small as an XLM-R model.")
def main(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files) / 1e6
    print(f"Wrote {folder} ({size:.0f} MB): {', '.join(str(path.relative_to(folder)) for path in files)}")
    print(f"Next: {command_name('clpl_moe.train')} --config quickstart --model_name_or_path {folder}")


if __name__ == "__main__":
    main()
