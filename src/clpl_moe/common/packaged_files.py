"""Files that come with the package: configs and samples of data.

In a wheel they lie in ``clpl_moe/resources``. A clone, or an editable install of one, uses its own ``configs`` and
``data/samples``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clpl_moe.common.errors import UserError, at

_PACKAGED = Path(__file__).parents[1] / "resources"
ROOT = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[3]
_CONFIGS = ROOT / "configs"
_SAMPLES = "data/samples"


def packaged_configs() -> list[str]:
    """Names that :func:`find_config` knows, such as ``ko`` and ``paper/ko``."""
    names = (path.relative_to(_CONFIGS).with_suffix("").as_posix() for path in _CONFIGS.rglob("*.yaml"))
    return sorted(name for name in names if not name.startswith("accelerate/"))  # options of accelerate, not of ours


def find_config(name: str | Path) -> Path:
    """The file that ``--config NAME`` means: of this path; else ``NAME.yaml`` in the current folder; else the packaged one."""
    path, beside = Path(name), Path(f"{name}.yaml")
    for found in (path, beside):
        if found.is_file():
            return found
    if path.as_posix() in packaged_configs():
        return _CONFIGS / beside
    fault = "found a folder, expected a config file" if name != "" and path.is_dir() else "no such config file"
    raise UserError(f"{at(path)}: {fault}; packaged ones are {', '.join(packaged_configs())}")


def with_packaged_samples(config: Path, values: dict[str, Any]) -> dict[str, Any]:
    """A packaged config's options, with paths to samples that are not in the current folder; other configs stay as they are."""
    if _CONFIGS not in config.resolve().parents:
        return values
    return {key: _with_packaged_samples(value) for key, value in values.items()}


def _with_packaged_samples(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_packaged_samples(item) for item in value]
    if isinstance(value, str) and f"{value}/".startswith(f"{_SAMPLES}/") and not Path(value).exists():
        return str(ROOT / value)
    return value


def packaged_samples() -> Path:
    """The folder of the sample collections, such as ``ko``: that of the current folder, else the packaged one."""
    return Path(_with_packaged_samples(_SAMPLES))
