"""What a training run would do, worked out without loading weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from clpl_moe.data.dataset import CLPLTrainDataset
from clpl_moe.data.sampler import EpochBatchSampler
from clpl_moe.encoder.load import is_2024_checkpoint, read_config, refuse_unloadable
from clpl_moe.errors import UserError, at
from clpl_moe.moe.config import MoEConfig
from clpl_moe.moe.inject import has_experts, inject_moe
from clpl_moe.moe.modeling_clpl_moe import MOE_CLASSES
from clpl_moe.training.arguments import CLPLDataArguments, CLPLModelArguments, CLPLTrainingArguments
from clpl_moe.training.model import choose_trainable
from clpl_moe.training.runner import check_batches, check_lengths, check_optimizer, open_ance_index

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
    """Figures of a run. Memory in bytes; tokens without padding."""

    examples: int
    steps_per_epoch: int
    steps: int
    tokens_per_step: int
    tokens_exact: bool
    parameters: int
    trained_parameters: int
    state_bytes: int
    activation_bytes: int
    lines: list[str]

    def __str__(self) -> str:
        return "\n".join(self.lines)


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
    check_lengths(encoder, model_args.model_name_or_path, data_args)
    wrapper = torch.nn.Module()
    wrapper.model = encoder
    try:
        choose_trainable(
            wrapper,
            training_args.trainable,
            fix_position_embedding=training_args.fix_position_embedding,
            fix_encoder=training_args.fix_encoder and not training_args.unified_finetuning,
            frozen_layers=training_args.frozen_layers,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    parameters = sum(p.numel() for p in encoder.parameters())
    trained = sum(p.numel() for p in encoder.parameters() if p.requires_grad)
    if training_args.dev_collection is not None:
        from clpl_moe.retrieval.collection import Collection

        dev = Collection.load(training_args.dev_collection, training_args.dev_language, training_args.dev_split)
    ance = None if training_args.ance_refresh is None else open_ance_index(data_args, training_args)

    world, accumulation = training_args.world_size, training_args.gradient_accumulation_steps
    batch = training_args.per_device_train_batch_size
    batches = EpochBatchSampler(
        dataset.part_sizes,
        batch,
        training_args.seed,
        num_processes=world,
        separate_parts=data_args.same_dataset_within_batch,
        drop_last=training_args.dataloader_drop_last,
    )
    check_batches(batches)
    steps_per_epoch = math.ceil(len(batches) / accumulation)
    steps = (
        training_args.max_steps
        if training_args.max_steps > 0
        else math.ceil(steps_per_epoch * training_args.num_train_epochs)
    )
    tokenizer = _tokenizer(model_args) if reached else None
    example_tokens, longest, with_penalty = _lengths(dataset, data_args, tokenizer)
    tokens = round(example_tokens * min(batch * world * accumulation, len(dataset)))
    # Weights in float32, gradients and AdamW's two moments of what is trained.
    state_bytes = 4 * parameters + 12 * trained
    held_tokens = batch * longest
    if training_args.grad_cache_tokens is not None:
        held_tokens = min(held_tokens, training_args.grad_cache_tokens)
    activation_bytes = _activations(encoder.config, held_tokens, training_args)
    of = f"{with_penalty:.0%} of the looked-at negatives have queries"
    lines = [
        f"base model      {model_args.model_name_or_path} ({shape_source})",
        f"experts         {encoder.config.moe if has_experts(encoder) else 'none'}",
        f"parameters      {parameters:,}, trained {trained:,} ({trained / parameters:.1%}, trainable: {training_args.trainable}"
        + (f", {training_args.frozen_layers} layers frozen)" if training_args.frozen_layers else ")"),
        f"examples        {len(dataset):,} in {len(dataset.part_sizes)} file(s); {of}",
        f"batch           {batch} per device × {world} device(s) × {accumulation} accumulated,"
        f" {data_args.train_group_size} passages a query",
        f"steps           {steps:,} ({steps_per_epoch:,} an epoch)",
        f"tokens a step   about {tokens:,}"
        + ("" if tokenizer is not None else " (from the texts' characters: the tokenizer could not be fetched)"),
        f"memory          about {(state_bytes + activation_bytes) / 2**30:.1f} GiB a device: weights, gradients and"
        f" optimizer {state_bytes / 2**30:.1f}, activations {activation_bytes / 2**30:.1f}",
        f"loss            temperature {training_args.temperature}, penalty weight {training_args.penalty_weight}"
        f" ({training_args.penalty}), in-batch negatives {'on' if training_args.in_batch_negatives else 'off'}",
        f"device          {_device(training_args)}",
        f"output          {training_args.output_dir}",
    ]
    if training_args.dev_collection is not None:
        lines.insert(
            -1,
            f"evaluation      {len(dev.queries):,} queries, {len(dev.passages):,} passages of {training_args.dev_collection}",
        )
    if ance is not None:
        every = "epoch" if training_args.ance_refresh == "epoch" else f"{training_args.ance_refresh} steps"
        lines.insert(
            -1,
            f"negatives       mined again each {every}, from {len(ance):,} passages of {training_args.ance_collection}",
        )
    if training_args.wants_cuda and not torch.accelerator.is_available():
        lines.append(
            "note            fp16 needs a CUDA device and this machine has none: the run itself would stop here"
        )
    return Plan(
        len(dataset), steps_per_epoch, steps, tokens, tokenizer is not None, parameters, trained, state_bytes,
        activation_bytes, lines,
    )  # fmt: skip


def _device(args: CLPLTrainingArguments) -> str:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() and not args.use_cpu else args.device.type
    return f"{name}, {'bfloat16' if args.bf16 else 'float16' if args.fp16 else 'float32'}"


def _meta_encoder(args: CLPLModelArguments):
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
    width = 2 if args.bf16 or args.wants_cuda else 4
    layer = (16 * config.hidden_size + 3 * config.intermediate_size) * width
    layers = config.num_hidden_layers
    per_token = layers * config.hidden_size * width + layer if args.gradient_checkpointing else layers * layer
    return tokens * per_token
