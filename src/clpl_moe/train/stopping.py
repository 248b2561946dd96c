"""SIGTERM ends a training with a checkpoint: Slurm, Kubernetes and spot machines send it before they take the machine away.

1. A handler notes the signal; a second one ends the process at once.
2. At the end of each step the processes agree on whether one of them was signalled. torchrun signals all of them, but they
   may be in different steps.
3. The trainer evaluates where that is due, and saves a checkpoint; then :class:`Stopped` ends the run.
4. The run that goes on removes that checkpoint again, unless it was due by ``save_strategy`` anyway.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing.util  # whose own function at exit has to come after ours
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from clpl_moe.common.errors import Stopped, UserError
from clpl_moe.common.output import is_first_process


class StopOnSignal(TrainerCallback):
    """Saves a checkpoint and raises :class:`Stopped` after the step in which a signal came.

    Args:
        signals: while :meth:`listening`, these are caught.
    """

    def __init__(self, signals: Sequence[signal.Signals]) -> None:
        self.signals = signals
        self._received = 0
        self._agreed = 0  # the signal that all processes stop for
        self._group: Any = None
        self._saved = 0  # the last step with a checkpoint
        self._not_due = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within it signals are noted; only a process's main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        process = os.getpid()

        def note(number: int, frame: FrameType | None) -> None:
            for known in self.signals:
                signal.signal(known, signal.SIG_DFL)
            if os.getpid() != process:  # one that was just forked to make batches
                return
            self._received = number
            if is_first_process():
                name = signal.Signals(number).name
                os.write(2, f"\n{name}: saving a checkpoint after this step; a second signal ends at once\n".encode())

        before = {known: signal.signal(known, note) for known in self.signals}
        try:
            yield
        finally:
            for known, handler in before.items():
                signal.signal(known, handler)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1 and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")  # does not wait for the device

    def _agree(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        if args.world_size > 1:
            number = torch.tensor([self._received])
            dist.all_reduce(number, dist.ReduceOp.MAX, group=self._group)
            self._agreed = int(number)
        else:
            self._agreed = self._received
        if self._agreed:
            self._not_due |= not control.should_save and state.global_step != self._saved
            control.should_save = True
            args.save_only_model = False  # of which no run could go on

    def only_for_this(self, args: TrainingArguments, state: TrainerState) -> bool:
        """Whether a checkpoint that is about to be saved would not be without the signal."""
        is_best = args.save_strategy == "best" and state.best_global_step == state.global_step
        return self._not_due and not is_best

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if (state.epoch or 0) % 1:  # else what is due at the end of the epoch comes first
            self._agree(args, state, control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._agree(args, state, control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step:  # of an evaluation before the first step nothing is saved
            self._agree(args, state, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._saved = state.global_step
        if not self._agreed:
            return
        name, step = signal.Signals(self._agreed).name, state.global_step
        checkpoint = Path(args.output_dir or "", f"{PREFIX_CHECKPOINT_DIR}-{step}")
        told = f"stopped by {name} after step {step}, saved to {checkpoint}; resume_from_checkpoint true goes on from there"
        raise Stopped(told if state.is_world_process_zero else "", self._agreed)


@contextlib.contextmanager
def lost_processes_named() -> Iterator[None]:
    """What the libraries of communication raise where another process has ended becomes a :class:`UserError`."""
    try:
        yield
    except RuntimeError as error:
        if not dist.is_initialized() or not re.search("gloo|nccl|connection (closed|reset)", str(error), re.IGNORECASE):
            raise
        first = " ".join(str(error).split())[:200]
        raise UserError(
            f"another process of this training has ended, and this one ends with it: its message says why ({first});"
            " resume_from_checkpoint true goes on from the last checkpoint"
        ) from None


def ignore_in_workers(number: int) -> None:
    """For processes that make batches: a signal to the whole job is the trainer's; they end with it."""
    del number
    for known in (signal.SIGTERM, *((signal.SIGUSR1,) if sys.platform != "win32" else ())):
        signal.signal(known, signal.SIG_IGN)


@atexit.register
def _end_workers() -> None:
    """What makes batches and is left at the exit: Python would send it SIGTERM, which it ignores, and wait for ever."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
