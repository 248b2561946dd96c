"""Short names of models, for tables and folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def distinct_models(models: Sequence[str]) -> list[str]:
    """The models, each once; two spellings of one folder count as one model."""
    return list({_parts(name): name for name in reversed(models)}.values())[::-1]


def model_labels(models: Sequence[str]) -> list[str]:
    """A short name for each model: the last part of its path, with as many parts before it as make all names differ."""
    parts = [_parts(name) for name in models]
    for depth in range(1, max(map(len, parts)) + 1):
        labels = ["_".join(p[-depth:]) for p in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{label}_{number}" for number, label in enumerate(labels, 1)]


def _parts(name: str) -> tuple[str, ...]:
    return Path(name).resolve().parts[1:] or ("root",) if Path(name).exists() else tuple(name.split("/"))
