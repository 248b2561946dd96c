"""The trainer: batches that resume exactly, losses by name, evaluation by retrieval, model folders as checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import skip_first_batches
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerControl
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from clpl_moe.common.allocator import release_freed_memory
from clpl_moe.common.errors import UserError, at, one_line
from clpl_moe.common.machine import peak_memory
from clpl_moe.data.sampler import EpochBatchSampler
from clpl_moe.encoder import Encoder
from clpl_moe.encoder.adapter import has_adapter, load_adapter_weights
from clpl_moe.encoder.packing import PackedTexts, send
from clpl_moe.encoder.weights import HEAD_FILES, load_weights
from clpl_moe.moe.install import layer_states
from clpl_moe.train import callbacks
from clpl_moe.train.ance import NEGATIVES_FILE, NegativeRefresher
from clpl_moe.train.arguments import CLPLTrainingArguments
from clpl_moe.train.checkpoint import read_state, unlike
from clpl_moe.train.checksums import with_checksums
from clpl_moe.train.divided_trainer import DividedTrainer
from clpl_moe.train.metrics_file import METRICS_FILE, cut_back, read_metrics
from clpl_moe.train.model import CLPLModel
from clpl_moe.train.sharding import is_divided, put_weights
from clpl_moe.train.stopping import StopOnSignal, ignore_in_workers
from clpl_moe.train.terms import TermSums, joined

_RELEASE_STEPS = 8  # on a CPU: about 2% of the processor time


class CLPLTrainer(DividedTrainer):
    """FlagEmbedding's trainer with what it lacks.

    Tokenizer, settings and length of ``encoder``, which is trained, are saved with every checkpoint, and so are
    ``base_heads``, the base model's heads by file name, unless they are trained. ``evaluator`` computes metrics of an
    encoder on the dev collection, ``refresher`` mines negatives again. ``kwargs`` are transformers'.
    """

    def __init__(
        self,
        *,
        encoder: Encoder,
        base_heads: dict[str, dict[str, Tensor]],
        evaluator: Callable[[Encoder], dict[str, float]] | None,
        batch_sampler: EpochBatchSampler,
        refresher: NegativeRefresher | None = None,
        **kwargs: Any,
    ) -> None:
        # transformers wants to see a dataset where there is evaluation; ours is the evaluator's.
        dataset: list[Any] | None = [] if evaluator is not None else None
        super().__init__(eval_dataset=dataset, processing_class=encoder.tokenizer, **kwargs)
        self.encoder, self.base_heads, self.batch_sampler = encoder, base_heads, batch_sampler
        self.evaluator, self.refresher = evaluator, refresher
        self._fresh: tuple[Any, Any] | None = None  # an epoch's batches, and those that took their place
        self._terms = TermSums()
        self._stop = StopOnSignal(self.args.stop_signals)
        self._tokenizer_state = lengths_of(encoder.tokenizer)
        self._first_step = 0  # that this process knows the loss of
        self._saved_step: int | None = None
        self._extra: Path | None = None  # a checkpoint that goes when there is another one, or the result
        self.remove_callback(DEFAULT_PROGRESS_CALLBACK)  # in a notebook another one than on a console
        self.remove_callback(PrinterCallback)
        self.add_callback(callbacks.EpochCallback(batch_sampler))
        self.add_callback(callbacks.MetricsFileCallback())
        self.add_callback(callbacks.ConsoleCallback())
        self.begin = callbacks.TrainBegin(self._go_on)
        self.callback_handler.callbacks.insert(0, self.begin)  # others write files then
        self.add_callback(self._stop)
        if self.args.early_stopping_patience is not None:
            self.add_callback(callbacks.EarlyStopping(self.args.early_stopping_patience))

    def get_train_dataloader(self) -> DataLoader:
        workers = self.args.dataloader_num_workers
        return DataLoader(
            self.train_dataset,
            batch_sampler=self.batch_sampler,
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            # Workers hold the negatives that the training set had when they were started.
            persistent_workers=self.args.dataloader_persistent_workers and workers > 0 and self.refresher is None,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers > 0 else None,
            # A generator of its own: drawing from the global one would change dropout after a resume.
            generator=torch.Generator().manual_seed(self.args.seed),
            worker_init_fn=ignore_in_workers,
        )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            with self._stop.listening():
                return super().train(*args, **kwargs)
        finally:  # so that a message begins on a line of its own
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, callbacks.ConsoleCallback) and callback.training_bar is not None:
                    callback.training_bar.close()

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The batches of one optimizer step, each with its weight, so that every query counts the same.

        Before it, negatives are mined again where that is due, after the checkpoint of the step before was written: a run
        that resumes from it mines the same here.
        """
        steps_per_epoch = max(1, count_steps(self.batch_sampler, self.args)[0])
        step = self.state.global_step
        if self.args.use_cpu and step % _RELEASE_STEPS == 0:
            release_freed_memory()
        done = step % steps_per_epoch * self.args.gradient_accumulation_steps
        if self.refresher is not None:
            if self.refresher.due(step, steps_per_epoch):
                self.refresh_negatives(self.refresher, steps_per_epoch)
                # Worker processes have made batches ahead, with the old negatives.
                self._fresh = epoch_iterator, iter(skip_first_batches(self.get_train_dataloader(), done))
            if self._fresh is not None and self._fresh[0] is epoch_iterator:
                epoch_iterator = self._fresh[1]
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        own, total = self.batch_sampler.queries(done, len(batches))
        for batch, queries in zip(batches, own, strict=True):
            batch["weight"] = queries * len(batches) * self.args.world_size / total
        return batches, items

    def refresh_negatives(self, refresher: NegativeRefresher, steps_per_epoch: int) -> None:
        """Mine negatives again with the current weights, which stay as they are, as does the random state."""
        first = self.is_world_process_zero()
        with self._current_encoder() as encoder:
            figures = refresher.refresh(encoder, self.state.global_step, steps_per_epoch, self._gather_objects, first)
        self.log(figures)

    @contextlib.contextmanager
    def _current_encoder(self) -> Iterator[Encoder]:
        with self.whole_encoder() as model:
            yield dataclasses.replace(self.encoder, model=model)

    def _prepare_input(self, data: Any) -> Any:
        # The stock version waits until the device is done with all before it.
        if isinstance(data, PackedTexts):
            return data.to(self.args.device)
        if isinstance(data, Tensor) and not data.is_floating_point():
            return send(data, self.args.device)
        return super()._prepare_input(data)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any):
        self.accelerator.unwrap_model(model).step = self.state.global_step
        weight = inputs.pop("weight", 1.0)
        with self.in_autocast():
            outputs = model(**inputs)
        self._terms.add(outputs.terms or {}, weight)
        loss = outputs.loss if weight == 1 else outputs.loss * weight
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of each loss term, similarity and expert load since the last log, over all processes; raises
        :class:`UserError` where the loss is nan or inf, and steps with such losses are not skipped."""
        if "loss" in logs:
            logs = {**logs, **self._pop_terms()}
        if "train_loss" in logs:  # the stock one is of the steps since the resume
            logs["train_loss"] = self._total_loss_scalar / max(1, self.state.global_step - self._first_step)
            logs["train_peak_memory"] = peak_memory(self.args.device.type)
        super().log(logs, start_time)
        if not math.isfinite(logs.get("loss", 0)) and self.accelerator.scaler is None:
            raise self._diverged(f"the loss is {logs['loss']}")

    def _diverged(self, found: str) -> UserError:
        clipping = "" if self.args.max_grad_norm else " and with clipping (max_grad_norm 1)"
        return UserError(
            f"{found} at step {self.state.global_step}: training has diverged. Begin again with a lower learning_rate (it was"
            f" {self.args.learning_rate:g}){clipping}, from the base model or from a checkpoint in {self.args.output_dir}"
        )

    def _pop_terms(self) -> dict[str, float]:
        means: dict[str, float] = {}
        for name, (total, weights) in joined(self._gather_objects(self._terms.plain())).items():
            mean = torch.tensor(total, dtype=torch.float64) / weights
            if mean.ndim == 0:
                means[name] = mean.item()
                continue
            layers = [layer for layer, *_ in layer_states(self.accelerator.unwrap_model(self.model).model)]
            for layer, load in zip(layers, mean.tolist(), strict=True):
                for expert, share in enumerate(load):
                    means[f"{name}/layer_{layer}/expert_{expert}"] = share
        self._terms.clear()
        return means

    def wait(self) -> None:
        """Until all processes have come here."""
        self._gather_objects(None)

    def of_first(self, value: Any) -> Any:
        """The first process's value; all have to call this."""
        return self._gather_objects(value)[0]

    def _gather_objects(self, value: Any) -> list[Any]:
        if self.args.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.args.world_size
        torch.distributed.all_gather_object(gathered, value)
        return gathered

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """nDCG@5, nDCG@10 and recall@100 of the current encoder on the dev collection."""
        if self.evaluator is None:
            raise ValueError("there is no dev collection to evaluate on: set dev_collection")
        start = time.perf_counter()
        # Rounded otherwise, processes would choose other best checkpoints, and stop after other steps: the first one's count.
        with self._current_encoder() as encoder:
            found = self.of_first(self.evaluator(encoder))
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        metrics[f"{metric_key_prefix}_seconds"] = round(time.perf_counter() - start, 2)
        self.log(metrics)
        control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # type: ignore[has-type]
        self.control = control
        return metrics

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._remove_unfinished()
        progress = self._progress()
        if self._stop.only_for_this(self.args, self.state):
            progress["extra"] = {"best": self.state.best_model_checkpoint}
            self.args.save_total_limit = None  # no other one goes for it
        callbacks.keep_progress(self.state, progress)
        with _full_disk_as_such(self.args.output_dir), with_checksums(self.state, self.remove_extra):
            super()._save_checkpoint(*args, **kwargs)

    def _remove_unfinished(self) -> None:
        """Of a checkpoint of this step that a killed run began, or that is damaged, nothing may be left in the new one."""
        folder = self.args.folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.is_world_process_zero() and folder.is_dir() and self._saved_step != self.state.global_step:
            shutil.rmtree(folder)
        self._saved_step = self.state.global_step
        self.wait()  # all write into it

    def _progress(self) -> dict[str, Any]:
        """What is logged next, as far as it is known: with it, a resumed run logs the same."""
        terms = joined(self._gather_objects(self._terms.plain()))
        losses = self._gather_objects(self._tr_loss.item())
        return {
            "whole_steps": self.batch_sampler.whole_steps,
            "first_step": self._first_step,
            "total_loss": self._total_loss_scalar,
            "loss": sum(losses) / len(losses),
            "last_logged": self._globalstep_last_logged,
            "terms": terms,
        }

    def _go_on(self) -> None:
        """At the beginning of training, take over :meth:`_progress` of the checkpoint."""
        found = callbacks.progress(self.state)
        self._know_extra()
        self._first_step = found.get("first_step", self.state.global_step)
        if "terms" in found:
            self._total_loss_scalar = found["total_loss"]
            self._tr_loss.fill_(found["loss"])
            self._globalstep_last_logged = found["last_logged"]
            self._terms.restore(found["terms"] if self.is_world_process_zero() else {})

    def _know_extra(self) -> None:
        """If the run goes on from a checkpoint that only a signal brought about: the run is as if there had been none."""
        extra, step = callbacks.progress(self.state).get("extra"), self.state.global_step
        if isinstance(extra, dict):
            self._extra = self.args.folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"
            best = extra.get("best")
            self.state.best_model_checkpoint = best if isinstance(best, str) else None
            if self.state.best_global_step == step:  # transformers would take the folder for the best checkpoint
                self.state.best_global_step = None

    def remove_extra(self) -> None:
        """Remove the checkpoint that only a signal brought about, now that it is no longer needed."""
        if self._extra is not None and self.is_world_process_zero():
            shutil.rmtree(self._extra, ignore_errors=True)
        self._extra = None

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        with _full_disk_as_such(self.args.output_dir):
            super().save_model(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        model: CLPLModel = self.accelerator.unwrap_model(self.model)
        # A state_dict is given where the model is divided: the first process has it, the others none.
        weights = state_dict.values() if state_dict is not None else (p for p in model.parameters() if p.requires_grad)
        finite = all(bool(tensor.isfinite().all()) for tensor in weights)
        if not (finite if state_dict is None else self.of_first(finite)):
            raise self._diverged("weights are nan or inf")
        if not self.args.should_save:
            return
        heads, of_heads = self.base_heads, {name: f"{Path(name).stem}." for name in HEAD_FILES}
        if model.unified_finetuning:
            state = model.state_dict() if state_dict is None else state_dict
            heads = {
                name: {k.removeprefix(begin): v for k, v in state.items() if k.startswith(begin)}
                for name, begin in of_heads.items()
            }
        # The tokenizer's is of the last batch, unless the run did not make one.
        set_lengths(self.encoder.tokenizer, *self._tokenizer_state)
        if state_dict is None:
            dataclasses.replace(self.encoder, model=model.model).save(folder, heads=heads)
        else:
            with self._whole.filled(
                {k.removeprefix("model."): v for k, v in state_dict.items() if k.startswith("model.")}, "cpu"
            ) as whole:
                dataclasses.replace(self.encoder, model=whole).save(folder, heads=heads)
        if self.refresher is not None:
            self.refresher.save(folder / NEGATIVES_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        trained: CLPLModel = self.accelerator.unwrap_model(self.model if model is None else model)
        divided = is_divided(trained.model)
        if divided:
            with _told_if_it_does_not_fit(resume_from_checkpoint):
                self.put_weights(resume_from_checkpoint)
        else:
            load = load_adapter_weights if has_adapter(trained.model) else load_weights
            load(trained.model, resume_from_checkpoint)
        if trained.unified_finetuning:
            for name in HEAD_FILES:
                path = Path(resume_from_checkpoint) / name
                with _told_if_it_does_not_fit(path):
                    state = torch.load(path, map_location="cpu", weights_only=True)
                    head = getattr(trained, Path(name).stem)
                    put_weights(head, state) if divided else head.load_state_dict(state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with _told_if_it_does_not_fit(f"{Path(checkpoint) / 'scheduler.pt'} or optimizer.pt"):
            if self.sharding is not None:
                self.load_divided_optimizer(checkpoint)
                return
            groups = [
                {name: group[name] for name in group if name != "params"} for group in self.optimizer.param_groups
            ]
            schedule = self.lr_scheduler.state_dict()
            super()._load_optimizer_and_scheduler(checkpoint)
            if found := unlike(self.optimizer.param_groups, groups) or unlike(self.lr_scheduler.state_dict(), schedule):
                raise ValueError(found)
            for parameter, state in self.optimizer.state.items():
                for name in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
                    value = state.get(name)
                    if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                        raise ValueError(f"{name} is {tuple(value.shape)}, the parameter {tuple(parameter.shape)}")

    def _load_scaler(self, checkpoint: str | None) -> None:
        with _told_if_it_does_not_fit(Path(checkpoint or "", "scaler.pt")):
            super()._load_scaler(checkpoint)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.wait()  # with its state, the first process says that all files of the checkpoint are there

    def is_over(self, checkpoint: str | Path) -> bool:
        """Whether a run that resumes from a checkpoint has no step left: transformers would train one more."""
        state = read_state(checkpoint)
        return state.global_step >= count_steps(self.batch_sampler, self.args)[1] or callbacks.waited_enough(
            state, self.args
        )

    def best_checkpoint(self, run: Path) -> Path | None:
        """The best checkpoint of the run in a folder: there, as the folder may have been moved, unless the run went on from a
        checkpoint in another folder."""
        known = self.state.best_model_checkpoint
        if known is None:
            return None
        there = run / Path(known).name
        return there if there.is_dir() or not Path(known).is_dir() else Path(known)

    def load_result(self, checkpoint: str | Path) -> None:
        """What training would end with after the last checkpoint of a run that :meth:`is_over`."""
        self.state = read_state(checkpoint)
        self._know_extra()
        best = self.best_checkpoint(Path(checkpoint).parent) if self.args.load_best_model_at_end else None
        self._load_from_checkpoint(str(best or checkpoint))
        self._log_end(callbacks.progress(self.state))

    def _log_end(self, progress: dict[str, Any]) -> None:
        """Log what transformers logs at the end of training, unless the run has come so far before."""
        path = self.args.folder / METRICS_FILE
        if self.is_world_process_zero() and path.exists():
            cut_back(path, self.state.global_step)
            for record in read_metrics(path):
                if "train_loss" in record:
                    self.state.log_history.append({name: record[name] for name in record if name != "step"})
                    self.state.log_history[-1]["step"] = record["step"]
                    return
        if "total_loss" in progress:
            self._total_loss_scalar, self._first_step = (
                progress["total_loss"] + progress["loss"],
                progress["first_step"],
            )
            speed = {f"train_{name}": 0.0 for name in ("runtime", "samples_per_second", "steps_per_second")}
            self.log({**speed, "total_flos": self.state.total_flos, "train_loss": 0.0})

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        # The stock estimate reads an input that these batches do not have.
        return 0


def count_steps(batches: EpochBatchSampler, args: CLPLTrainingArguments) -> tuple[int, int]:
    """Optimizer steps of an epoch, and of the run."""
    per_epoch = math.ceil(len(batches) / args.gradient_accumulation_steps)
    return per_epoch, args.max_steps if args.max_steps > 0 else math.ceil(per_epoch * args.num_train_epochs)


def lengths_of(tokenizer: Any) -> tuple[Any, Any]:
    """Truncation and padding of a fast tokenizer, which every call changes and ``tokenizer.json`` holds."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    return (None, None) if fast is None else (fast.truncation, fast.padding)


def set_lengths(tokenizer: Any, truncation: dict[str, Any] | None, padding: dict[str, Any] | None) -> None:
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is not None:
        fast.no_truncation() if truncation is None else fast.enable_truncation(**truncation)
        fast.no_padding() if padding is None else fast.enable_padding(**padding)


@contextlib.contextmanager
def _told_if_it_does_not_fit(place: str | Path) -> Iterator[None]:
    """Whatever a file of another content raises as it is loaded becomes a :class:`UserError`."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserError(f"{at(place)}: does not fit this model ({one_line(error)})") from None


@contextlib.contextmanager
def _full_disk_as_such(folder: str) -> Iterator[None]:
    """What safetensors and torch raise where a disk is full becomes the ``OSError`` that it is."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        if "No space left" not in str(error) and "PytorchStreamWriter" not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), folder) from error
