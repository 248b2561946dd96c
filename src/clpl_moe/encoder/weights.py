"""The weights of a model folder or hub model: in one file or several, in either format."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import cached_file

from clpl_moe.common.errors import UserError, at

_FORMATS = ("model.safetensors", "pytorch_model.bin")
_WEIGHT_FILES = [name + index for name in _FORMATS for index in ("", ".index.json")]


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Put a model folder's weights into a model; in place; :class:`UserError` where names or shapes differ."""
    try:
        model.load_state_dict(read_weights(str(path), {}))
    except RuntimeError as error:
        first = " ".join(str(error).split("\n")[:2]).replace("\t", "")  # a line for each weight
        raise UserError(f"{at(path)}: the weights do not fit this model: {first}") from None


def _weight_file(path: str, hub: dict[str, Any]) -> str:
    for name in _WEIGHT_FILES:
        if (file := find_file(path, name, hub)) is not None:
            return file
    raise UserError(f"{at(path)}: no weights, expected one of {', '.join(_WEIGHT_FILES)}")


def weight_names(path: str, hub: dict[str, Any]) -> list[str]:
    """The names of a model's weights, which are not read."""
    file = _weight_file(path, hub)
    return list(_weight_map(file)) if file.endswith(".json") else list(_read_file(file, names_only=True))


def read_weights(path: str, hub: dict[str, Any]) -> dict[str, Tensor]:
    """A model's weights by name, on the CPU; :class:`UserError` where there are none, or they cannot be read."""
    file = _weight_file(path, hub)
    if not file.endswith(".json"):
        return _read_file(file)
    state: dict[str, Tensor] = {}
    for shard in sorted(set(_weight_map(file).values())):
        state.update(_read_file(find_file(path, shard, hub) or str(Path(path) / shard)))
    return state


def _weight_map(file: str) -> dict[str, str]:
    """Name of each weight and of the file that holds it, from the index of weights in several files."""
    try:
        return dict(json.loads(Path(file).read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{at(file)}: no index of weights ({type(error).__name__}: {error})") from None


def _read_file(file: str, names_only: bool = False) -> dict[str, Any]:
    try:
        if file.endswith(".safetensors"):
            from safetensors import safe_open

            with safe_open(file, framework="pt") as tensors:
                return {key: None if names_only else tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
        # Files of before torch 1.6 are no archives and cannot be mapped.
        return torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
    except Exception as error:
        raise UserError(f"{at(file)}: the weights cannot be read: {type(error).__name__}: {error}") from error


def find_file(path: str, name: str, hub: dict[str, Any] | None = None) -> str | None:
    """Where a file of a folder or of a hub model lies on this disk; None where it cannot be had."""
    if Path(path).is_dir():
        file = Path(path) / name
        return str(file) if file.is_file() else None
    try:
        return cached_file(path, name, _raise_exceptions_for_missing_entries=False, **(hub or {}))
    except (OSError, ValueError):
        return None
