"""The course of a training run: its options, and what it logged."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clpl_moe.common.cli import load_yaml
from clpl_moe.train.metrics_file import METRICS_FILE, read_metrics


@dataclass
class RunCourse:
    """A training run: its options (empty where the folder has none) and the records of its ``metrics.jsonl``."""

    name: str
    folder: Path
    options: dict[str, Any]
    records: list[dict[str, Any]] = field(repr=False)

    @classmethod
    def read(cls, folder: Path, name: str) -> RunCourse:
        """Read a run folder; raises :class:`UserError` where its ``metrics.jsonl`` is missing or broken."""
        config = folder / "train_config.yaml"
        options = load_yaml(config) if config.is_file() else {}
        return cls(name, folder, options, read_metrics(folder / METRICS_FILE))

    @property
    def end(self) -> dict[str, Any] | None:
        """The record of the training's end; None for a run that has not ended."""
        return next((record for record in reversed(self.records) if "train_runtime" in record), None)

    def expert_load(self) -> tuple[list[float], list[list[list[float]]]]:
        """Steps (S,), and shares (S, L, N) of layers and experts."""
        found = {r["step"]: r["expert_load"] for r in self.records if r.get("expert_load")}
        return list(found), list(found.values())

    def moe_layers(self, count: int) -> list[int]:
        """The numbers of the layers with experts, of which there are ``count``."""
        from clpl_moe.moe.config import MoEConfig

        try:
            config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
            layers = MoEConfig(layers=config["moe"]["layers"]).resolve_layers(config["num_hidden_layers"])
        except (OSError, ValueError, KeyError, TypeError):
            layers = []
        return layers if len(layers) == count else list(range(count))


def series(records: Sequence[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """Steps and values, by step, of the records that have both; of a step logged twice, the later record counts."""
    pairs = [(r["step"], r[name]) for r in records if "step" in r and name in r]
    return sorted(dict(p for p in pairs if all(type(v) in (int, float) and math.isfinite(v) for v in p)).items())
