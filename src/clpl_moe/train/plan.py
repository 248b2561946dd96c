"""What a training run is and does: printed before it begins, and alone with ``dry_run``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from clpl_moe.moe.inject import has_experts
from clpl_moe.train.trainer import count_steps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from clpl_moe.retrieval.collection import Collection
    from clpl_moe.train.arguments import CLPLDataArguments, CLPLModelArguments, CLPLTrainingArguments
    from clpl_moe.train.data import RunData


@dataclass
class Estimate:
    """What a run takes, worked out from a sample of its examples.

    Attributes:
        shape_source: where the encoder's shape comes from.
        with_penalty: share of the negatives that have queries.
        tokens_per_step: without padding; ``tokens_exact`` where a tokenizer counted them.
        state_bytes: of weights, gradients and optimizer on one device; ``activation_bytes`` likewise.
    """

    shape_source: str
    with_penalty: float
    tokens_per_step: int
    tokens_exact: bool
    state_bytes: int
    activation_bytes: int


@dataclass
class Plan:
    """What a run is; ``str`` is the text for people.

    Attributes:
        experts: what the experts are; None: there are none.
        mined_passages: how many passages negatives are mined from in training.
        estimate: what it takes; None where the run begins anyway.
    """

    model_args: CLPLModelArguments
    data_args: CLPLDataArguments
    training_args: CLPLTrainingArguments
    experts: dict[str, Any] | None
    parameters: int
    trained_parameters: int
    examples: int
    files: int
    steps_per_epoch: int
    steps: int
    dev: Collection | None
    mined_passages: int | None
    estimate: Estimate | None = None

    def __str__(self) -> str:
        args, data = self.training_args, self.data_args
        frozen = f", {args.frozen_layers} layers frozen" if args.frozen_layers else ""
        source = f" ({self.estimate.shape_source})" if self.estimate else ""
        lines = [
            ("base model", f"{self.model_args.model_name_or_path}{source}"),
            ("experts", ", ".join(f"{name} {value}" for name, value in (self.experts or {}).items()) or "none"),
            (
                "parameters",
                f"{self.parameters:,}, trained {self.trained_parameters:,}"
                f" ({self.trained_parameters / self.parameters:.1%}, trainable: {args.trainable}{frozen})",
            ),
            ("examples", f"{self.examples:,} in {self.files} file(s)"),
            ("lengths", f"queries {data.query_max_len}, passages {data.passage_max_len} tokens"),
            (
                "batch",
                f"{args.per_device_train_batch_size} per device × {args.world_size} device(s) ×"
                f" {args.gradient_accumulation_steps} accumulated, {data.train_group_size} passages a query",
            ),
            ("steps", f"{self.steps:,} ({self.steps_per_epoch:,} an epoch)"),
            (
                "loss",
                f"temperature {args.temperature}, penalty weight {args.penalty_weight} ({args.penalty}), in-batch negatives"
                f" {'on' if args.in_batch_negatives else 'off'}",
            ),
            ("device", _device(args)),
            *self._estimated(),
        ]
        if self.dev is not None:
            sizes = f"{len(self.dev.queries):,} queries, {len(self.dev.passages):,} passages"
            lines.append(("evaluation", f"{sizes} of {args.dev_collection}, language {args.dev_language}"))
        if self.mined_passages is not None:
            every = "epoch" if args.ance_refresh == "epoch" else f"{args.ance_refresh} steps"
            mined = f"mined again each {every}, from {self.mined_passages:,} passages of {args.ance_collection}"
            lines.append(("negatives", mined))
        if args.resume_from_checkpoint is not None:
            lines.append(("resumed from", args.resume_from_checkpoint))
        lines.append(("output", str(args.output_dir)))
        if args.fp16_asked and not torch.accelerator.is_available():
            lines.append(("note", "fp16 needs a CUDA device and this machine has none: the run itself would stop here"))
        return "\n".join(f"{name:<16}{text}" for name, text in lines)

    def _estimated(self) -> list[tuple[str, str]]:
        if self.estimate is None:
            return []
        exact = self.estimate.tokens_exact
        guess = "" if exact else " (from the texts' characters: the tokenizer could not be fetched)"
        state, activations = self.estimate.state_bytes / 2**30, self.estimate.activation_bytes / 2**30
        return [
            ("penalty", f"{self.estimate.with_penalty:.0%} of the looked-at negatives have queries"),
            ("tokens a step", f"about {self.estimate.tokens_per_step:,}{guess}"),
            (
                "memory",
                f"about {state + activations:.1f} GiB a device: weights, gradients and optimizer {state:.1f},"
                f" activations {activations:.1f}",
            ),
        ]


def describe(
    model_args: CLPLModelArguments,
    data_args: CLPLDataArguments,
    training_args: CLPLTrainingArguments,
    encoder: PreTrainedModel,
    data: RunData,
) -> Plan:
    """The plan of a run with this encoder, whose trained parameters have been chosen, and with these data."""
    parameters = [p for name, p in encoder.named_parameters() if "pooler" not in name]
    steps_per_epoch, steps = count_steps(data.batches, training_args)
    return Plan(
        model_args,
        data_args,
        training_args,
        experts=encoder.config.moe if has_experts(encoder) else None,
        parameters=sum(p.numel() for p in parameters),
        trained_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        examples=len(data.dataset),
        files=len(data.dataset.part_sizes),
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        dev=data.dev,
        mined_passages=None if data.index is None else len(data.index),
    )


def _device(args: CLPLTrainingArguments) -> str:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() and not args.use_cpu else args.device.type
    return f"{name}, {'bfloat16' if args.bf16 else 'float16' if args.fp16 else 'float32'}"
