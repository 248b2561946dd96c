"""What transformers' trainer does otherwise where FSDP2 or DeepSpeed divides the model among processes.

Its checkpoints would have files that only the same kind of run reads, and need as many processes under DeepSpeed. These are
those of an undivided run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clpl_moe.common.errors import UserError, at
from clpl_moe.data.flag_embedding import EncoderOnlyEmbedderM3Trainer
from clpl_moe.encoder.weights import read_weights
from clpl_moe.train import sharding

OPTIMIZER_FILE, SCHEDULER_FILE = "optimizer.pt", "scheduler.pt"


class DividedTrainer(EncoderOnlyEmbedderM3Trainer):
    """FlagEmbedding's trainer of a model whose ``model`` is the encoder, for divided models, too.

    Attributes:
        sharding: who divides the model, as :func:`clpl_moe.train.sharding.sharding_of` says; None: nobody.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sharding = sharding.sharding_of(self)
        self._groups: list[list[nn.Parameter]] = []
        if self.sharding is not None:
            encoder = self.model.model
            self._whole = sharding.WholeCopy(encoder)
            state = self.accelerator.state
            if self.sharding == "FSDP2":
                sharding.configure_fsdp(state.fsdp_plugin, encoder)
            else:
                # DeepSpeed clips by itself.
                state.deepspeed_plugin.hf_ds_config.config.setdefault("gradient_clipping", self.args.max_grad_norm)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)
        self._groups = [list(group["params"]) for group in optimizer.param_groups]
        return optimizer

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if self.sharding in (None, "FSDP2") or resume_from_checkpoint is None:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        # transformers would let DeepSpeed load files of its own.
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._load_from_checkpoint(resume_from_checkpoint)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def in_autocast(self) -> contextlib.AbstractContextManager[Any]:
        """For the forward pass. FSDP2's own mixed precision would round embeddings and loss."""
        return self.accelerator.autocast() if self.sharding == "FSDP2" else contextlib.nullcontext()

    @contextlib.contextmanager
    def whole_encoder(self) -> Iterator[Any]:
        """The encoder's module with its current weights, whole; all processes have to call this."""
        encoder = self.accelerator.unwrap_model(self.model).model
        if self.sharding is None:
            yield encoder
            return
        weights = sharding.whole_weights(encoder, lambda weight: weight)
        with self._whole.filled(weights, self.args.device) as whole:
            yield whole

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.sharding is None:
            super().save_model(output_dir, _internal_call)
            return
        # On the first process only there is room for them.
        keep = self.args.should_save
        model = self.accelerator.unwrap_model(self.model)
        self._save(output_dir, sharding.whole_weights(model, lambda weight: weight.cpu() if keep else None))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def put_weights(self, folder: str) -> None:
        """Give the divided encoder the weights of a model folder; in place."""
        encoder = self.accelerator.unwrap_model(self.model).model
        with self._whole.filled(read_weights(folder, {}), "cpu") as whole:
            sharding.put_weights(encoder, whole.state_dict())

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.sharding is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = sharding.optimizer_state(self.optimizer, self._groups, keep=self.args.should_save)
        if state is not None:
            torch.save(state, Path(output_dir) / OPTIMIZER_FILE)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_FILE)

    def load_divided_optimizer(self, checkpoint: str) -> None:
        """Load optimizer and schedule, of a divided run or another."""
        path = Path(checkpoint) / OPTIMIZER_FILE
        if not path.is_file():
            raise UserError(f"{at(path)}: no such file; what older versions saved under FSDP or DeepSpeed cannot go on")
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        sharding.load_optimizer_state(self.optimizer, self._groups, state)
        schedule: dict[str, Tensor] = torch.load(Path(checkpoint) / SCHEDULER_FILE, weights_only=True)
        self.lr_scheduler.load_state_dict(schedule)
