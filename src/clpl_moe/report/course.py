"""The course of a training run: its options, and what it logged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clpl_moe.common.errors import UserError, at, shorten
from clpl_moe.common.files import is_number
from clpl_moe.common.yaml_files import load_yaml
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
        records = read_metrics(folder / METRICS_FILE)
        shapes = set()
        for number, record in enumerate(records, 1):
            for key in ("step", "train_runtime"):
                if key in record and not is_number(record[key]):
                    place = f"{at(folder / METRICS_FILE)}: record {number}: field '{key}'"
                    raise UserError(f"{place}: found {shorten(repr(record[key]), 60)}, expected a number")
            if load := record.get("expert_load"):
                shapes.add(_shape(load) if "step" in record else None)
            if len(shapes) > 1 or None in shapes:
                place = f"{at(folder / METRICS_FILE)}: record {number}: field 'expert_load'"
                raise UserError(f"{place}: expected the share of each expert of each layer, as in the records before")
        return cls(name, folder, options, records)

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
        except (OSError, UserError, ValueError, KeyError, TypeError, RecursionError):
            layers = []
        return layers if len(layers) == count else list(range(count))


def _shape(load: Any) -> tuple[int, int] | None:
    """Layers and experts of a load; None where it is none."""
    rows = load if isinstance(load, list) and all(isinstance(row, list) for row in load) else [[]]
    whole = len({len(row) for row in rows}) == 1 and all(is_number(share) for row in rows for share in row)
    return (len(rows), len(rows[0])) if whole and rows[0] else None


def series(records: Sequence[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """Steps and values, by step, of the records that have both; of a step logged twice, the later record counts."""
    return sorted({r["step"]: r[name] for r in records if is_number(r.get("step")) and is_number(r.get(name))}.items())
