"""``metrics.jsonl`` of a run folder: every log of the run, a line each."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

from clpl_moe.common.errors import UserError, at
from clpl_moe.common.files import atomic_open, parse_line

METRICS_FILE = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``, without an unfinished last line; :class:`UserError` where there are none."""
    if not path.is_file():
        raise UserError(f"{at(path)}: no such file; expected the folder of a training run")
    lines = path.read_bytes().splitlines(keepends=True)
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            records.append(parse_line(path, number, line))
        except UserError:
            # A run that was killed, or is writing right now, leaves an unfinished last line.
            if number < len(lines) or line.endswith(b"\n"):
                raise
    return records


def cut_back(path: Path, step: int) -> None:
    """Drop the records that a run resumed at ``step`` will write again; all of them for a run that begins anew."""
    kept = []
    for line in path.read_bytes().splitlines():
        # Cut off when the run was killed, or damaged.
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            record = json.loads(line)
            # Negatives that were mined after the checkpoint of the same step are mined again.
            if record["step"] + ("ance_refresh" in record) <= step and step > 0:
                kept.append(line)
    with atomic_open(path, "wb") as file:
        file.writelines(line + b"\n" for line in kept)


def append(path: Path, step: int, logs: dict[str, Any]) -> None:
    """Add what was logged at ``step``; nan and inf, which JSON has not, become null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in logs.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, **_fold_expert_load(finite)}, allow_nan=False) + "\n")


def _fold_expert_load(logs: dict[str, Any]) -> dict[str, Any]:
    """The logs with ``expert_load/layer_i/expert_j`` entries gathered into one table ``expert_load[i][j]``."""
    table: dict[int, list[float]] = {}
    for name, value in logs.items():
        if name.startswith("expert_load/"):
            layer = int(name.split("/")[1].removeprefix("layer_"))
            table.setdefault(layer, []).append(value)
    others = {name: value for name, value in logs.items() if not name.startswith("expert_load/")}
    return others | ({"expert_load": [table[layer] for layer in sorted(table)]} if table else {})
