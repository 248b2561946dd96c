"""What a run shows and writes while it goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from transformers import (
    EarlyStoppingCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from clpl_moe.common.files import atomic_open
from clpl_moe.data.sampler import EpochBatchSampler

METRICS_FILE = "metrics.jsonl"


class EpochCallback(TrainerCallback):
    """Tells the sampler which epoch begins, also in a resumed run."""

    def __init__(self, sampler: EpochBatchSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A run that resumes within an epoch has a fractional one.
        self.sampler.set_epoch(int((state.epoch or 0) + 1e-9))


class MetricsFileCallback(TrainerCallback):
    """Appends every log to ``metrics.jsonl`` of the run folder; a resumed run first drops what it will log again."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        path = Path(args.output_dir) / METRICS_FILE
        if not state.is_world_process_zero or not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
                # Negatives that were mined after the checkpoint of the same step are mined again.
                after = record["step"] + ("ance_refresh" in record)
                if after <= state.global_step and state.global_step > 0:
                    kept.append(line)
            except (ValueError, KeyError):
                continue  # cut off when the run was killed
        with atomic_open(path) as file:
            file.writelines(f"{line}\n" for line in kept)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        # JSON has no nan.
        logs = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in logs.items()
        }
        record = {"step": state.global_step, **fold_expert_load(logs)}
        with (Path(args.output_dir) / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")


def fold_expert_load(logs: dict[str, Any]) -> dict[str, Any]:
    """The logs with ``expert_load/layer_i/expert_j`` entries gathered into one table ``expert_load[i][j]``."""
    folded = {name: value for name, value in logs.items() if not name.startswith("expert_load/")}
    table: dict[int, list[float]] = {}
    for name, value in logs.items():
        if name.startswith("expert_load/"):
            layer = int(name.split("/")[1].removeprefix("layer_"))
            table.setdefault(layer, []).append(value)
    if table:
        folded["expert_load"] = [table[layer] for layer in sorted(table)]
    return folded


class EarlyStopping(EarlyStoppingCallback):
    """transformers', which forgets in a resumed run how long it has been waiting."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        # transformers looks it up when it saves, and does not find it in a run that began without early stopping.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.early_stopping_patience_counter = _waited(state)


def _waited(state: TrainerState) -> int:
    """For how many evaluations a run had not improved when its state was saved."""
    callback = state.stateful_callbacks.get(EarlyStopping.__name__, {})
    return callback.get("attributes", {}).get("early_stopping_patience_counter", 0)


def waited_enough(state: TrainerState, args: TrainingArguments) -> bool:
    """Whether early stopping had ended a run when its state was saved."""
    return args.early_stopping_patience is not None and _waited(state) >= args.early_stopping_patience


class ConsoleCallback(ProgressCallback):
    """A progress bar, with one short line for each log."""

    _TRAINING = (
        ("loss", "loss {:.4f}"),
        ("contrastive", "contrastive {:.4f}"),
        ("penalty", "penalty {:.4f}"),
        ("positive_similarity", "q-pos {:.3f}"),
        ("negative_similarity", "q-neg {:.3f}"),
        ("negative_query_similarity", "neg-own {:.3f}"),
        ("learning_rate", "lr {:.2e}"),
        ("grad_norm", "grad {:.2f}"),
    )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is None or not logs:
            return
        if any(name.startswith("eval_") for name in logs):
            shown = [f"{name.removeprefix('eval_')} {value:.4f}" for name, value in logs.items() if "@" in name]
            line = "evaluation: " + "  ".join(shown)
        elif "ance_refresh" in logs:
            line = (
                f"negatives mined again: {logs['ance_changed']:,} of {logs['ance_negatives']:,} are new"
                f" ({logs['ance_seconds']:.0f} s)"
            )
        elif "loss" in logs:
            line = "  ".join(form.format(logs[name]) for name, form in self._TRAINING if logs.get(name) is not None)
            shares = [value for name, value in logs.items() if name.startswith("expert_load/")]
            if shares:
                line += f"  expert load {min(shares):.2f}-{max(shares):.2f}"
        else:
            return
        self.training_bar.write(f"step {state.global_step}: {line}")
