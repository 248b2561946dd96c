"""What a run shows and writes while it goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from transformers import EarlyStoppingCallback, ProgressCallback, TrainerCallback, TrainerState, TrainingArguments

from clpl_moe.data.sampler import EpochBatchSampler
from clpl_moe.train.metrics_file import METRICS_FILE, append, cut_back

if TYPE_CHECKING:
    from clpl_moe.train.arguments import CLPLTrainingArguments


class EpochCallback(TrainerCallback):
    """Tells the sampler which epoch begins, also in a resumed run."""

    def __init__(self, sampler: EpochBatchSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        # A run that resumes within an epoch has a fractional one.
        self.sampler.set_epoch(int((state.epoch or 0) + 1e-9))


class MetricsFileCallback(TrainerCallback):
    """Appends every log to ``metrics.jsonl`` of the run folder; a resumed run first drops what it will log again."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        path = Path(args.output_dir or "", METRICS_FILE)
        if state.is_world_process_zero and path.exists():
            cut_back(path, state.global_step)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            append(Path(args.output_dir or "", METRICS_FILE), state.global_step, logs)


class TrainBegin(TrainerCallback):
    """Calls functions when training begins: a checkpoint has been loaded, and nothing been written."""

    def __init__(self, *functions: Callable[[], None]) -> None:
        self.functions = list(functions)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        for function in self.functions:
            function()


class EarlyStopping(EarlyStoppingCallback):
    """transformers', which forgets in a resumed run how long it has been waiting."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        # transformers looks it up when it saves, and does not find it in a run that began without early stopping.
        _saved_callbacks(state).setdefault(type(self).__name__, self.state())
        self.early_stopping_patience_counter = waited(state)


def waited(state: TrainerState) -> int:
    """For how many evaluations a run had not improved when its state was saved."""
    callback = _saved_callbacks(state).get(EarlyStopping.__name__, {})
    return callback.get("attributes", {}).get("early_stopping_patience_counter", 0)


def _saved_callbacks(state: TrainerState) -> dict[str, Any]:
    return cast("dict[str, Any]", state.stateful_callbacks)  # transformers' annotation has a list


_PROGRESS = "CLPLTrainer"


def keep_progress(state: TrainerState, progress: dict[str, Any]) -> None:
    """Put what the trainer has not logged yet into a state that is saved."""
    _saved_callbacks(state)[_PROGRESS] = {"args": {}, "attributes": progress}


def progress(state: TrainerState) -> dict[str, Any]:
    """What :func:`keep_progress` put there; nothing in checkpoints of before."""
    return _saved_callbacks(state).get(_PROGRESS, {}).get("attributes", {})


def waited_enough(state: TrainerState, args: CLPLTrainingArguments) -> bool:
    """Whether early stopping had ended a run when its state was saved."""
    return args.early_stopping_patience is not None and waited(state) >= args.early_stopping_patience


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

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is None or not logs:
            return
        if any(name.startswith("eval_") for name in logs):
            shown = [f"{name.removeprefix('eval_')} {value:.4f}" for name, value in logs.items() if "@" in name]
            line = "evaluation: " + "  ".join(shown)
        elif "ance_refresh" in logs:
            new, took = f"{logs['ance_changed']:,} of {logs['ance_negatives']:,}", logs["ance_seconds"]
            line = f"negatives mined again: {new} are new ({took:.0f} s)"
        elif "loss" in logs:
            line = "  ".join(form.format(logs[name]) for name, form in self._TRAINING if logs.get(name) is not None)
            shares = [value for name, value in logs.items() if name.startswith("expert_load/")]
            if shares:
                line += f"  expert load {min(shares):.2f}-{max(shares):.2f}"
        else:
            return
        self.training_bar.write(f"step {state.global_step}: {line}")
