"""What a training run is: the data that it reads besides its base model, and its plan, which is printed before it begins."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from clpl_moe.common.errors import UserError
from clpl_moe.data.dataset import CLPLTrainDataset
from clpl_moe.data.near_copies import Together, mark_examples
from clpl_moe.data.sampler import EpochBatchSampler
from clpl_moe.mine.index import PassageIndex
from clpl_moe.moe.inject import has_experts
from clpl_moe.retrieval.collection import Collection
from clpl_moe.train.arguments import CLPLDataArguments, CLPLModelArguments, CLPLTrainingArguments
from clpl_moe.train.base_model import cached_layers
from clpl_moe.train.lengths import Lengths
from clpl_moe.train.trainer import count_steps

logger = logging.getLogger(__name__)

EXPERTS_FOLDER = "experts"
_ENOUGH_STEPS = 100  # of docs/study.md
_MOST_EPOCHS = 3


@dataclass
class RunData:
    """The data of a run: ``dev`` is empty without evaluation, ``index`` None without refreshes."""

    dataset: CLPLTrainDataset
    batches: EpochBatchSampler
    dev: list[Collection]
    index: PassageIndex | None


def open_data(data_args: CLPLDataArguments, args: CLPLTrainingArguments, whole_steps: bool = True) -> RunData:
    """Open and check the data of a run; raises :class:`UserError` where data or a collection have a fault, no batch can be
    made, or the run wants scores of mined negatives. ``whole_steps`` is :class:`EpochBatchSampler`'s."""
    dataset = CLPLTrainDataset(
        data_args, seed=args.seed, leave_out_answers=args.mask_duplicates, guide_margin=args.guide_margin
    )
    batches = EpochBatchSampler(
        dataset.part_sizes,
        args.per_device_train_batch_size,
        args.seed if args.data_seed is None else args.data_seed,
        accumulation=args.gradient_accumulation_steps,
        whole_steps=whole_steps,
        process_index=args.process_index,
        num_processes=args.world_size,
        separate_parts=data_args.same_dataset_within_batch,
        drop_last=args.dataloader_drop_last,
        even=args.negatives_cross_device,
        marks=mark_examples(dataset.dataset) if data_args.distinct_batches else None,
    )
    if len(batches) == 0:  # a run would end without a step
        raise UserError(
            f"dataloader_drop_last leaves out everything: no file has the {batches.planned_size} examples"
            " of a batch; lower per_device_train_batch_size or remove dataloader_drop_last"
        )
    check_contrast(dataset, data_args, args)
    if args.num_train_epochs is None:
        args.num_train_epochs = _epochs(math.ceil(len(batches) / args.gradient_accumulation_steps))
    if dataset.prompts and not data_args.query_instruction_for_retrieval:
        logger.warning(
            "%s of %s examples have a 'prompt', which has no effect: it takes the place of a query instruction, and there"
            " is none (query_instruction_for_retrieval)",
            f"{dataset.prompts:,}",
            f"{len(dataset):,}",
        )
    if args.negatives_cross_device:
        check_gathering(dataset.in_batch_negatives, data_args, args.world_size)
    dev, index = [], None
    if args.dev_collection is not None:
        dev = [Collection.load(args.dev_collection, language, args.dev_split) for language in args.dev_languages]
    if args.ance_refresh is not None and args.ance_collection is not None and args.ance_language is not None:
        if data_args.knowledge_distillation:
            raise UserError(
                "knowledge_distillation needs scores of a teacher, mined negatives have none: unset ance_refresh"
            )
        corpus = Collection.load(args.ance_collection, args.ance_language, args.ance_split)
        index = PassageIndex.load(corpus, args.ance_positive_queries)
    return RunData(dataset, batches, dev, index)


def _epochs(steps: int) -> float:
    """How often data of so many steps are gone through, where the options leave it open."""
    return float(min(max(1, math.ceil(_ENOUGH_STEPS / steps)), _MOST_EPOCHS))


def check_contrast(dataset: CLPLTrainDataset, data_args: CLPLDataArguments, args: CLPLTrainingArguments) -> None:
    """Refuse data whose queries have no negative, neither one of their own nor another query's passage: the loss would
    be 0, whatever the model does."""
    separate = data_args.same_dataset_within_batch
    parts = range(len(dataset.part_sizes)) if separate else [0]
    for part in parts:
        own_only = not args.in_batch_negatives
        own_only |= not (dataset.in_batch_negatives[part] if separate else all(dataset.in_batch_negatives))
        examples = dataset.part_sizes[part] if separate else len(dataset)
        devices = args.world_size if args.negatives_cross_device else 1
        batch = 1 if own_only else min(examples, args.per_device_train_batch_size * devices)
        group, pairs = dataset.group_size(part), dataset.pairs[part] if separate else sum(dataset.pairs)
        if group > 1 and (dataset.own_negatives[part] if separate else any(dataset.own_negatives)):
            continue
        own = "train_group_size is 1" if data_args.train_group_size == 1 else "the lines of train_data have no 'neg'"
        if group > 1 and pairs < examples:
            own = "each 'neg' of train_data is known to answer its query"
        # A pair among lines with negatives gets other queries' positives.
        if batch == 1 and (group == 1 or not pairs):
            other = "in-batch negatives are off" if own_only else f"a batch has 1 of {examples:,} queries"
            raise UserError(
                f"{own}, and {other}: a query has no negative to be contrasted with; "
                + ("allow in-batch negatives" if own_only else "set per_device_train_batch_size to at least 2")
                + ", or give the lines negatives (mine finds some)"
            )
        if (all_of_them := dataset.without_contrast[part]) is not None:
            queries, positives = all_of_them
            they = f"{queries:,} {'query' if queries == 1 else 'queries'} and {positives:,} positive{'s' * (positives > 1)}"
            raise UserError(
                f"{own}, and in all {examples:,} lines there are {they}, each of which answers each query: nothing is"
                " left to be contrasted with; give the lines negatives (mine finds some), or add other queries"
            )


def check_gathering(in_batch_negatives: Sequence[bool], data_args: CLPLDataArguments, world_size: int) -> None:
    """Refuse what makes some processes of a step gather negatives and others not: they would wait for each other."""
    if world_size > 1 and not data_args.same_dataset_within_batch and len(set(in_batch_negatives)) > 1:
        raise UserError(
            "negatives_cross_device cannot mix files with in-batch negatives and files without (*no_in_batch_neg) in a"
            " batch: set same_dataset_within_batch"
        )


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
    pairs: int  # examples without negatives
    lengths: Lengths
    group_size: int  # passages of a query, its positive among them; the most that a file's have
    steps_per_epoch: int
    steps: int
    dev: list[Collection]  # empty without evaluation
    mined_passages: int | None  # how many passages negatives are mined from in training
    left_out: int = 0  # negatives of the files
    left_out_by_guide: int = 0
    small_groups: int = 0  # examples with too few negatives for their group
    cached_layers: int = 0  # whose outputs are kept
    together: Together | None = None  # how distinct the batches are; None where they need not be
    estimate: Estimate | None = None  # None where the run begins anyway

    def __str__(self) -> str:
        args, estimate = self.training_args, self.estimate
        share = self.trained_parameters / self.parameters
        frozen = f", embeddings and the lowest {args.frozen_layers} layers frozen" if args.frozen_layers else ""
        gpu = torch.cuda.is_available() and not args.use_cpu
        lines = [
            f"base model      {self.model_args.model_name_or_path}{f' ({estimate.shape_source})' if estimate else ''}"
            f"{f', revision {self.model_args.revision}' if self.model_args.revision else ''}",
            f"experts         {', '.join(f'{name} {value}' for name, value in (self.experts or {}).items()) or 'none'}"
            f"{', merged at the end' if args.merge_experts else ''}",
            f"parameters      {self.parameters:,}, trained {self.trained_parameters:,} ({share:.1%},"
            f" trainable: {args.trainable}{frozen})",
            *([f"adapter         {args.adapter_in_words()}"] if args.trainable == "lora" else []),
            *(
                [
                    f"frozen cache    outputs of the lowest {self.cached_layers} layers, up to {args.frozen_cache_gb:g} GB"
                ]
                if self.cached_layers
                else []
            ),
            f"examples        {self.examples:,} in {self.files} file(s)"
            f"{f', {self.pairs:,} of them pairs without negatives' if self.pairs else ''}",
            *self._negatives(),
            f"lengths         {self.lengths}",
            f"batch           {args.per_device_train_batch_size} per device × {args.world_size} device(s) ×"
            f" {args.gradient_accumulation_steps} accumulated, {self.group_size} passages a query",
            *([] if self.together is None else [f"distinct        {self.together}"]),
            f"steps           {self.steps:,} ({self.steps_per_epoch:,} an epoch)",
            f"loss            {args.in_words()}",
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
        if self.dev:
            queries, passages = (sum(len(getattr(one, of)) for one in self.dev) for of in ("queries", "passages"))
            languages = f"{'languages' if len(self.dev) > 1 else 'language'} {', '.join(args.dev_languages)}"
            lines.append(
                f"evaluation      {queries:,} queries, {passages:,} passages of {args.dev_collection}, {languages}"
                f"{'; the best checkpoint is kept, or the base model where none beats it' if args.base_counts else ''}"
            )
        if args.merge_experts:
            lines.append(
                f"merging         the experts of a layer, to one; with experts: {args.folder / EXPERTS_FOLDER}"
            )
        if args.shares:
            shares = " or ".join(f"{alpha:g}" for alpha in args.shares)
            chosen = ", or not at all: as is best on the dev questions" if self.dev else ""
            lines.append(f"mixing          trained weights with the base model's, alpha {shares}{chosen}")
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

    def _negatives(self) -> list[str]:
        """How the negatives of the examples differ from those in the files."""
        found = []
        if self.left_out:
            found.append(f"{self.left_out:,} left out: known to answer their query, or there twice")
        if self.training_args.guide_margin is not None:
            found.append(f"{self.left_out_by_guide:,} left out by the guide, with every positive of their query")
        if self.small_groups:
            found.append(f"too few for the group of {self.small_groups:,} examples, which stays smaller")
        return [f"negatives       {text}" for text in found]


def describe(
    model_args: CLPLModelArguments,
    data_args: CLPLDataArguments,
    training_args: CLPLTrainingArguments,
    encoder: PreTrainedModel,
    data: RunData,
    lengths: Lengths,
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
        pairs=sum(data.dataset.pairs),
        lengths=lengths,
        group_size=max(map(data.dataset.group_size, range(len(data.dataset.part_sizes)))),
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        dev=data.dev,
        mined_passages=None if data.index is None else len(data.index),
        left_out=data.dataset.left_out,
        left_out_by_guide=data.dataset.left_out_by_guide,
        small_groups=data.dataset.small_groups,
        cached_layers=cached_layers(encoder, training_args),
        together=data.batches.together(),
    )
