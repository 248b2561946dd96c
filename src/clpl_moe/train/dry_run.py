"""The plan of a run without the run: config and data are checked, and no weights are loaded."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from clpl_moe.common.errors import UserError
from clpl_moe.data.dataset import CLPLTrainDataset
from clpl_moe.data.lengths import Count, sample, token_counter
from clpl_moe.encoder.adapter import whole_model
from clpl_moe.encoder.hub import asked
from clpl_moe.encoder.load import is_2024_checkpoint, read_config, refuse_unloadable, tokenizer_of, try_tokenizer
from clpl_moe.encoder.settings import check_lengths
from clpl_moe.moe.config import MoEConfig
from clpl_moe.moe.modeling_clpl_moe import MOE_CLASSES
from clpl_moe.train.arguments import CLPLDataArguments, CLPLModelArguments, CLPLTrainingArguments
from clpl_moe.train.base_model import (
    add_experts,
    check_dimensions,
    choose_trainable,
    give_experts,
    resolve_settings,
)
from clpl_moe.train.checks import check_optimizer
from clpl_moe.train.lengths import Lengths, choose_lengths, longest_counted
from clpl_moe.train.lora import adapted_experts
from clpl_moe.train.plan import Estimate, Plan, describe, open_data
from clpl_moe.train.resume import keep_options

# The shape of the base model of the published recipe, so that its configs can be checked where the hub is out of reach
# (config.json of BAAI/bge-m3).
_BGE_M3 = {
    "model_type": "xlm-roberta", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "vocab_size": 250002, "max_position_embeddings": 8194, "type_vocab_size": 1,
}  # fmt: skip
_CHARACTERS_PER_TOKEN = 2.5  # of the XLM-R tokenizer on Korean, Persian and Hindi text: 1.9 to 3.3


def plan_run(
    model_args: CLPLModelArguments, data_args: CLPLDataArguments, training_args: CLPLTrainingArguments
) -> Plan:
    """Read config and data as training would, stop at the same faults, and estimate what the run takes."""
    check_optimizer(training_args)
    keep_options(model_args, data_args, training_args)
    config, shape_source, reached = _config(model_args)
    resolve_settings(model_args, data_args, training_args)
    data = open_data(data_args, training_args)
    encoder = _meta_encoder(config, model_args, training_args)
    check_lengths(encoder, data_args.query_max_len, data_args.passage_max_len, model_args.model_name_or_path)
    check_dimensions(encoder, training_args)
    give_experts(encoder, model_args, data_args, training_args)
    choose_trainable(encoder, training_args)
    tokenizer = _tokenizer(model_args) if reached else None
    count = _guess if tokenizer is None else token_counter(tokenizer, longest_counted(encoder))
    name, checkpoint = model_args.model_name_or_path, training_args.resume_from_checkpoint
    lengths = choose_lengths(data_args, data.dataset, encoder, count, name=name, checkpoint=checkpoint)
    plan = describe(model_args, data_args, training_args, encoder, data, lengths)
    example_tokens, longest, with_penalty = _lengths(data.dataset, lengths, count)
    batch = training_args.per_device_train_batch_size
    of_a_step = min(batch * training_args.world_size * training_args.gradient_accumulation_steps, plan.examples)
    held_tokens = batch * longest
    if training_args.grad_cache_tokens is not None:
        held_tokens = min(held_tokens, training_args.grad_cache_tokens)
    plan.estimate = Estimate(
        shape_source=shape_source,
        with_penalty=with_penalty,
        tokens_per_step=round(example_tokens * of_a_step),
        tokens_exact=tokenizer is not None,
        # Weights in float32, gradients and AdamW's two moments of what is trained.
        state_bytes=4 * plan.parameters + 12 * plan.trained_parameters,
        activation_bytes=_activations(encoder, held_tokens, training_args),
    )
    return plan


def _config(args: CLPLModelArguments) -> tuple[dict[str, Any], str, bool]:
    """The encoder's config.json; where its shape comes from; whether the model could be reached."""
    try:
        return read_config(args.model_name_or_path, **args.hub), "shape from its config.json", True
    except UserError:
        if args.model_name_or_path != "BAAI/bge-m3":
            raise
        return _BGE_M3, "known shape, the hub was not reached", False


def _meta_encoder(
    values: dict[str, Any], args: CLPLModelArguments, training_args: CLPLTrainingArguments
) -> PreTrainedModel:
    """The encoder with experts, shapes only."""
    model_type = values.get("model_type")
    configs = [(c, c.config_class) for pair in MOE_CLASSES.items() for c in pair]
    classes = {config_class.model_type: (c, config_class) for c, config_class in configs if config_class is not None}
    with torch.device("meta"):
        moe = None
        with refuse_unloadable(args.model_name_or_path, "encoder", args.trust_remote_code):
            if model_type in classes:
                known = {
                    k: v for k, v in values.items() if k != "model_type" and not (k == "moe" and isinstance(v, str))
                }
                encoder_class, config_class = classes[model_type]
                encoder = encoder_class(config_class.from_dict(known), add_pooling_layer=False)
            else:
                place, hub = whole_model(args.model_name_or_path, args.hub)
                config = AutoConfig.from_pretrained(
                    place, trust_remote_code=args.trust_remote_code, **asked(hub, place)
                )
                encoder = AutoModel.from_config(config, trust_remote_code=args.trust_remote_code)
            if is_2024_checkpoint(values):
                target = values.get("moe") or "intermediate"
                moe = MoEConfig(values["num_experts"], values["num_experts_per_tok"], target)
        add_experts(encoder, args, training_args, moe)
    return encoder


def _tokenizer(args: CLPLModelArguments) -> PreTrainedTokenizerBase | None:
    try:
        name, hub = tokenizer_of(args.model_name_or_path, args.tokenizer_name, args.hub)
        found = AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code, **asked(hub, name))
        try_tokenizer(found)
        return found
    except Exception:  # the real run says what is wrong with it; lengths can be guessed
        return None


def _guess(texts: list[str]) -> list[int]:
    return [round(len(text) / _CHARACTERS_PER_TOKEN) + 2 for text in texts]


def _lengths(dataset: CLPLTrainDataset, lengths: Lengths, count: Count) -> tuple[float, int, float]:
    """Mean tokens of an example, tokens of the longest one, share of negatives with queries."""

    def tokens(texts: list[str], option: str) -> int:
        return sum(min(found, lengths.limits[option]) for found in count(texts))

    totals, negatives, answered = [], 0, 0
    for example in sample(dataset):
        queries = [example.query, *(q for queries in example.negative_queries for q in queries)]
        totals.append(tokens(queries, "query_max_len") + tokens(example.passages, "passage_max_len"))
        negatives += len(example.negative_queries)
        answered += sum(bool(queries) for queries in example.negative_queries)
    return sum(totals) / len(totals), max(totals), answered / max(1, negatives)


def _activations(encoder: PreTrainedModel, tokens: int, args: CLPLTrainingArguments) -> int:
    """Bytes kept for the backward pass of ``tokens`` on one device, a rough figure.

    Per token and layer about 16 hidden-sized and 3 FFN-sized values (attention without its score matrix); gradient
    checkpointing keeps one hidden-sized value a layer and one whole layer. Experts with adapters are kept as sums of both.
    """
    config = encoder.config
    width = 2 if args.bf16 or args.fp16_asked else 4
    inner = getattr(config, "intermediate_size", 4 * config.hidden_size)
    layer = (16 * config.hidden_size + 3 * inner) * width
    layers = config.num_hidden_layers
    checkpointing = args.gradient_checkpointing or getattr(args, "activation_checkpointing", False)
    per_token = layers * config.hidden_size * width + layer if checkpointing else layers * layer
    return tokens * per_token + adapted_experts(encoder) * width // (layers if checkpointing else 1)
