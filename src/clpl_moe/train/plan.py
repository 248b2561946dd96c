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
    """What a run takes, worked out from a sample of its examples."""

    shape_source: str  # where the encoder's shape comes from
    with_penalty: float  # share of the negatives that have queries
    tokens_per_step: int  # without padding
    tokens_exact: bool  # counted by a tokenizer
    state_bytes: int  # of weights, gradients and optimizer on one device
    activation_bytes: int  # on one device


@dataclass
class Plan:
    """What a run is; ``str`` is the text for people."""

    model_args: CLPLModelArguments
    data_args: CLPLDataArguments
    training_args: CLPLTrainingArguments
    experts: dict[str, Any] | None  # None: there are none
    parameters: int
    trained_parameters: int
    examples: int
    files: int
    steps_per_epoch: int
    steps: int
    dev: Collection | None
    mined_passages: int | None  # how many passages negatives are mined from in training
    estimate: Estimate | None = None  # None where the run begins anyway

    def __str__(self) -> str:
        args, data, estimate = self.training_args, self.data_args, self.estimate
        share = self.trained_parameters / self.parameters
        frozen = f", {args.frozen_layers} layers frozen" if args.frozen_layers else ""
        gpu = torch.cuda.is_available() and not args.use_cpu
        lines = [
            f"base model      {self.model_args.model_name_or_path}{f' ({estimate.shape_source})' if estimate else ''}",
            f"experts         {', '.join(f'{name} {value}' for name, value in (self.experts or {}).items()) or 'none'}",
            f"parameters      {self.parameters:,}, trained {self.trained_parameters:,} ({share:.1%},"
            f" trainable: {args.trainable}{frozen})",
            f"examples        {self.examples:,} in {self.files} file(s)",
            f"lengths         queries {data.query_max_len}, passages {data.passage_max_len} tokens",
            f"batch           {args.per_device_train_batch_size} per device × {args.world_size} device(s) ×"
            f" {args.gradient_accumulation_steps} accumulated, {data.train_group_size} passages a query",
            f"steps           {self.steps:,} ({self.steps_per_epoch:,} an epoch)",
            f"loss            temperature {args.temperature}, penalty weight {args.penalty_weight} ({args.penalty}),"
            f" in-batch negatives {'on' if args.in_batch_negatives else 'off'}",
            f"device          {torch.cuda.get_device_name() if gpu else args.device.type},"
            f" {'bfloat16' if args.bf16 else 'float16' if args.fp16 else 'float32'}",
        ]
        if estimate is not None:
            guess = "" if estimate.tokens_exact else " (from the texts' characters: the tokenizer could not be fetched)"
            state, activations = estimate.state_bytes / 2**30, estimate.activation_bytes / 2**30
            lines += [
                f"penalty         {estimate.with_penalty:.0%} of the looked-at negatives have queries",
                f"tokens a step   about {estimate.tokens_per_step:,}{guess}",
                f"memory          about {state + activations:.1f} GiB a device: weights, gradients and optimizer {state:.1f},"
                f" activations {activations:.1f}",
            ]
        if self.dev is not None:
            lines.append(
                f"evaluation      {len(self.dev.queries):,} queries, {len(self.dev.passages):,} passages of"
                f" {args.dev_collection}, language {args.dev_language}"
            )
        if self.mined_passages is not None:
            every = "epoch" if args.ance_refresh == "epoch" else f"{args.ance_refresh} steps"
            lines.append(
                f"negatives       mined again each {every}, from {self.mined_passages:,} passages of {args.ance_collection}"
            )
        if args.resume_from_checkpoint is not None:
            lines.append(f"resumed from    {args.resume_from_checkpoint}")
        lines.append(f"output          {args.output_dir}")
        if args.fp16_asked and not torch.accelerator.is_available():
            lines.append(
                "note            fp16 needs a CUDA device and this machine has none: the run itself would stop here"
            )
        return "\n".join(lines)


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
