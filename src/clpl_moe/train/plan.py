"""What a training run would do, worked out without loading weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from clpl_moe.common.errors import UserError, at
from clpl_moe.data.dataset import CLPLTrainDataset
from clpl_moe.data.sampler import EpochBatchSampler
from clpl_moe.encoder.lengths import check_lengths
from clpl_moe.encoder.load import is_2024_checkpoint, read_config, refuse_unloadable
from clpl_moe.moe.config import MoEConfig
from clpl_moe.moe.inject import has_experts, inject_moe
from clpl_moe.moe.modeling_clpl_moe import MOE_CLASSES
from clpl_moe.retrieval.collection import Collection
from clpl_moe.train.arguments import CLPLDataArguments, CLPLModelArguments, CLPLTrainingArguments
from clpl_moe.train.checks import check_batches, check_optimizer
from clpl_moe.train.runner import open_ance_index
from clpl_moe.train.trainable import choose_trainable
from clpl_moe.train.trainer import count_steps

# The shape of the base model of the published recipe, so that its configs can be checked where the hub is out of reach
# (config.json of BAAI/bge-m3).
_BGE_M3 = {
    "model_type": "xlm-roberta",
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "vocab_size": 250002,
    "max_position_embeddings": 8194,
    "type_vocab_size": 1,
}
_SAMPLE = 256  # examples whose lengths are looked at
_CHARACTERS_PER_TOKEN = 2.5  # of the XLM-R tokenizer on Korean, Persian and Hindi text: 1.9 to 3.3


@dataclass
class Plan:
    """What a run is and what it takes; ``str`` is the text for people.

    Attributes:
        shape_source: where the encoder's shape comes from.
        experts: what the experts are; None: there are none.
        files: how many files the examples come from.
        with_penalty: share of the negatives that have queries.
        tokens_per_step: without padding; ``tokens_exact`` where a tokenizer counted them.
        state_bytes: of weights, gradients and optimizer on one device; ``activation_bytes`` likewise.
        dev: what training is evaluated on.
        mined_passages: how many passages negatives are mined from in training.
    """

    model_args: CLPLModelArguments
    data_args: CLPLDataArguments
    training_args: CLPLTrainingArguments
    shape_source: str
    experts: dict[str, Any] | None
    parameters: int
    trained_parameters: int
    examples: int
    files: int
    with_penalty: float
    steps_per_epoch: int
    steps: int
    tokens_per_step: int
    tokens_exact: bool
    state_bytes: int
    activation_bytes: int
    dev: Collection | None
    mined_passages: int | None

    def __str__(self) -> str:
        args = self.training_args
        frozen = f", {args.frozen_layers} layers frozen" if args.frozen_layers else ""
        guess = "" if self.tokens_exact else " (from the texts' characters: the tokenizer could not be fetched)"
        state, activations = self.state_bytes / 2**30, self.activation_bytes / 2**30
        lines = [
            f"base model      {self.model_args.model_name_or_path} ({self.shape_source})",
            f"experts         {self.experts or 'none'}",
            f"parameters      {self.parameters:,}, trained {self.trained_parameters:,}"
            f" ({self.trained_parameters / self.parameters:.1%}, trainable: {args.trainable}{frozen})",
            f"examples        {self.examples:,} in {self.files} file(s);"
            f" {self.with_penalty:.0%} of the looked-at negatives have queries",
            f"batch           {args.per_device_train_batch_size} per device × {args.world_size} device(s) ×"
            f" {args.gradient_accumulation_steps} accumulated, {self.data_args.train_group_size} passages a query",
            f"steps           {self.steps:,} ({self.steps_per_epoch:,} an epoch)",
            f"tokens a step   about {self.tokens_per_step:,}{guess}",
            f"memory          about {state + activations:.1f} GiB a device: weights, gradients and optimizer {state:.1f},"
            f" activations {activations:.1f}",
            f"loss            temperature {args.temperature}, penalty weight {args.penalty_weight} ({args.penalty}),"
            f" in-batch negatives {'on' if args.in_batch_negatives else 'off'}",
            f"device          {_device(args)}",
        ]
        if self.dev is not None:
            queries, passages = len(self.dev.queries), len(self.dev.passages)
            lines.append(f"evaluation      {queries:,} queries, {passages:,} passages of {args.dev_collection}")
        if self.mined_passages is not None:
            every = "epoch" if args.ance_refresh == "epoch" else f"{args.ance_refresh} steps"
            lines.append(
                f"negatives       mined again each {every}, from {self.mined_passages:,} passages of {args.ance_collection}"
            )
        lines.append(f"output          {args.output_dir}")
        if args.fp16_asked and not torch.accelerator.is_available():
            lines.append(
                "note            fp16 needs a CUDA device and this machine has none: the run itself would stop here"
            )
        return "\n".join(lines)


def make_plan(
    model_args: CLPLModelArguments, data_args: CLPLDataArguments, training_args: CLPLTrainingArguments
) -> Plan:
    """Read config and data as training would.

    Raises:
        UserError: what training would stop at.
    """
    check_optimizer(training_args)
    dataset = CLPLTrainDataset(data_args, seed=training_args.seed)
    encoder, shape_source, reached = _meta_encoder(model_args)
    check_lengths(encoder, data_args.query_max_len, data_args.passage_max_len, model_args.model_name_or_path)
    _choose_trainable(encoder, training_args)
    dev = ance = None
    if training_args.dev_collection is not None:
        dev = Collection.load(training_args.dev_collection, training_args.dev_language, training_args.dev_split)
    if training_args.ance_refresh is not None:
        ance = open_ance_index(data_args, training_args)
    steps_per_epoch, steps = _steps(dataset, data_args, training_args)
    tokenizer = _tokenizer(model_args) if reached else None
    example_tokens, longest, with_penalty = _lengths(dataset, data_args, tokenizer)
    batch = training_args.per_device_train_batch_size
    of_a_step = min(batch * training_args.world_size * training_args.gradient_accumulation_steps, len(dataset))
    held_tokens = batch * longest
    if training_args.grad_cache_tokens is not None:
        held_tokens = min(held_tokens, training_args.grad_cache_tokens)
    parameters = sum(p.numel() for p in encoder.parameters())
    trained = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    return Plan(
        model_args,
        data_args,
        training_args,
        shape_source=shape_source,
        experts=encoder.config.moe if has_experts(encoder) else None,
        parameters=parameters,
        trained_parameters=trained,
        examples=len(dataset),
        files=len(dataset.part_sizes),
        with_penalty=with_penalty,
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        tokens_per_step=round(example_tokens * of_a_step),
        tokens_exact=tokenizer is not None,
        # Weights in float32, gradients and AdamW's two moments of what is trained.
        state_bytes=4 * parameters + 12 * trained,
        activation_bytes=_activations(encoder.config, held_tokens, training_args),
        dev=dev,
        mined_passages=None if ance is None else len(ance),
    )


def _choose_trainable(encoder: PreTrainedModel, args: CLPLTrainingArguments) -> None:
    try:
        choose_trainable(
            encoder,
            args.trainable,
            fix_position_embedding=args.fix_position_embedding,
            fix_encoder=args.fix_encoder,
            frozen_layers=args.frozen_layers,
            heads=args.unified_finetuning,
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def _steps(
    dataset: CLPLTrainDataset, data_args: CLPLDataArguments, training_args: CLPLTrainingArguments
) -> tuple[int, int]:
    """Optimizer steps of an epoch, and of the run."""
    batches = EpochBatchSampler(
        dataset.part_sizes,
        training_args.per_device_train_batch_size,
        training_args.seed,
        num_processes=training_args.world_size,
        separate_parts=data_args.same_dataset_within_batch,
        drop_last=training_args.dataloader_drop_last,
    )
    check_batches(batches)
    return count_steps(batches, training_args)


def _device(args: CLPLTrainingArguments) -> str:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() and not args.use_cpu else args.device.type
    return f"{name}, {'bfloat16' if args.bf16 else 'float16' if args.fp16 else 'float32'}"


def _meta_encoder(args: CLPLModelArguments) -> tuple[PreTrainedModel, str, bool]:
    """The encoder with experts, shapes only; where its shape comes from; whether the model could be reached."""
    hub = {"cache_dir": args.cache_dir, "token": args.token}
    try:
        values, source, reached = read_config(args.model_name_or_path, **hub), "shape from its config.json", True
    except UserError:
        if args.model_name_or_path != "BAAI/bge-m3":
            raise
        values, source, reached = _BGE_M3, "known shape, the hub was not reached", False
    model_type = values.get("model_type")
    classes = {c.config_class.model_type: c for pair in MOE_CLASSES.items() for c in pair}
    with torch.device("meta"):
        if model_type in classes:
            known = {k: v for k, v in values.items() if k != "model_type" and not (k == "moe" and isinstance(v, str))}
            encoder = classes[model_type](classes[model_type].config_class.from_dict(known), add_pooling_layer=False)
        else:
            with refuse_unloadable(args.model_name_or_path, "encoder", args.trust_remote_code):
                config = AutoConfig.from_pretrained(
                    args.model_name_or_path, trust_remote_code=args.trust_remote_code, **hub
                )
                encoder = AutoModel.from_config(config, trust_remote_code=args.trust_remote_code)
        config = args.moe_config()
        if is_2024_checkpoint(values):
            config = MoEConfig(
                values["num_experts"], values["num_experts_per_tok"], values.get("moe") or "intermediate"
            )
        if config is not None and not has_experts(encoder):
            try:
                inject_moe(encoder, config)
            except ValueError as error:
                raise UserError(f"{at(args.model_name_or_path)}: {error}") from None
    return encoder, source, reached


def _tokenizer(args: CLPLModelArguments) -> PreTrainedTokenizerBase | None:
    try:
        return AutoTokenizer.from_pretrained(
            args.model_name_or_path,
            trust_remote_code=args.trust_remote_code,
            token=args.token,
            cache_dir=args.cache_dir,
        )
    except (OSError, ValueError, KeyError):
        return None


def _lengths(
    dataset: CLPLTrainDataset, data_args: CLPLDataArguments, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[float, int, float]:
    """Mean tokens of an example, tokens of the longest one, share of negatives with queries."""

    def count(texts: list[str], limit: int) -> int:
        if tokenizer is not None:
            return sum(map(len, tokenizer(texts, truncation=True, max_length=limit)["input_ids"])) if texts else 0
        return sum(min(limit, round(len(text) / _CHARACTERS_PER_TOKEN) + 2) for text in texts)

    totals, negatives, answered = [], 0, 0
    for index in range(0, len(dataset), max(1, len(dataset) // _SAMPLE)):
        example = dataset[(0, index)]
        queries = [example.query, *(q for queries in example.negative_queries for q in queries)]
        totals.append(count(queries, data_args.query_max_len) + count(example.passages, data_args.passage_max_len))
        negatives += len(example.negative_queries)
        answered += sum(bool(queries) for queries in example.negative_queries)
    return sum(totals) / len(totals), max(totals), answered / max(1, negatives)


def _activations(config, tokens: int, args: CLPLTrainingArguments) -> int:
    """Bytes kept for the backward pass of ``tokens`` on one device, a rough figure.

    Per token and layer about 16 hidden-sized and 3 FFN-sized values (attention without its score matrix); gradient
    checkpointing keeps one hidden-sized value a layer and one whole layer.
    """
    width = 2 if args.bf16 or args.fp16_asked else 4
    layer = (16 * config.hidden_size + 3 * config.intermediate_size) * width
    layers = config.num_hidden_layers
    per_token = layers * config.hidden_size * width + layer if args.gradient_checkpointing else layers * layer
    return tokens * per_token
