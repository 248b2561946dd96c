"""What a run makes of its base model: pooling and prompts, sparse and multi-vector heads, experts, trained parameters."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from clpl_moe.common.errors import OptionError, UserError, at, one_line
from clpl_moe.encoder.frozen_cache import FrozenCache
from clpl_moe.encoder.packing import can_pack
from clpl_moe.encoder.settings import EmbeddingSettings, read_settings
from clpl_moe.encoder.weights import HEAD_FILES, find_heads, read_head
from clpl_moe.moe.config import MoEConfig
from clpl_moe.moe.inject import choose_expert, expert_parameters, ffn_parameters, has_experts, inject_moe
from clpl_moe.moe.install import find_layers, layer_states
from clpl_moe.moe.modeling_clpl_moe import MOE_CLASSES
from clpl_moe.retrieval.options import choose_or_refuse
from clpl_moe.train.arguments import CLPLDataArguments, CLPLModelArguments, CLPLTrainingArguments
from clpl_moe.train.lora import add_lora

logger = logging.getLogger(__name__)


def resolve_settings(
    model_args: CLPLModelArguments, data_args: CLPLDataArguments, training_args: CLPLTrainingArguments
) -> EmbeddingSettings:
    """Pooling and prompts: as configured, and otherwise as the base model's folder says, whose prompts then stand in
    ``data_args``."""
    base = read_settings(model_args.model_name_or_path, **model_args.hub)
    if base.truncate_dim is not None:
        logger.warning(
            "the base model's folder truncates embeddings to %s dimensions; the folders of this run do not, and what is"
            " trained is the whole embeddings, or matryoshka_dims",
            base.truncate_dim,
        )
    prompts = {"query": "", "passage": ""}
    for kind, default in (("query", base.query_prompt), ("passage", base.passage_prompt)):
        name = f"{kind}_instruction_for_retrieval"
        given = getattr(data_args, name)
        instruction = (default or None) if given is None else given
        setattr(data_args, name, instruction)  # "" stays: no prompt, also where the base model has one
        if not instruction:
            continue
        form = getattr(data_args, f"{kind}_instruction_format")
        prompts[kind], _, after = form.format(instruction, "\0").partition("\0")
        if after:
            logger.warning(
                f"{kind}_instruction_format puts text after the {kind}: the saved folder's prompt cannot say so, add it"
                " yourself when you encode"
            )
    pooling = training_args.sentence_pooling_method or base.pooling
    return EmbeddingSettings(pooling, training_args.normalize_embeddings, prompts["query"], prompts["passage"])


def read_heads(path: str, *, required: bool, **hub: str | None) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of the sparse and multi-vector heads that a base model has, by file name.

    They are ``required`` where they are trained: then :class:`UserError` is raised where the hub gives no answer, which is
    warned of otherwise.
    """
    try:
        files = find_heads(path, **hub)
    except UserError as error:
        if required:
            raise
        logger.warning("%s. The folders of this run will have none: only dense embeddings will be of use", error)
        return {}
    return {name: read_head(file) for name, file in files.items()}


def make_heads(
    weights: dict[str, dict[str, torch.Tensor]], path: str, hidden_size: int, colbert_dim: int
) -> dict[str, nn.Linear]:
    """The heads of a base model as modules, new ones where it has none; :class:`UserError` for heads of other shapes."""
    widths = {"sparse_linear.pt": 1, "colbert_linear.pt": colbert_dim if colbert_dim > 0 else hidden_size}
    heads = {}
    for name in HEAD_FILES:
        head = heads[Path(name).stem] = nn.Linear(hidden_size, widths[name])
        if name not in weights:
            logger.warning("%s has no %s: training begins with a new one", path, name)
            continue
        try:
            head.load_state_dict(weights[name])
        except RuntimeError as error:
            raise UserError(
                f"{at(path)}: {name} does not fit a head of {hidden_size} to {widths[name]}: {one_line(error)}"
            ) from None
    return heads


def check_dimensions(encoder: PreTrainedModel, args: CLPLTrainingArguments) -> None:
    """Raise :class:`OptionError` where ``matryoshka_dims`` are more than a base model's embeddings have."""
    try:
        args.check_dimensions(encoder.config.hidden_size)
    except ValueError as error:
        raise OptionError("matryoshka_dims", str(error).removeprefix("matryoshka_dims: ")) from None


def add_experts(
    encoder: PreTrainedModel,
    model_args: CLPLModelArguments,
    training_args: CLPLTrainingArguments,
    config: MoEConfig | None = None,
) -> None:
    """Put experts into a base model that has none, of ``config`` or as the options say, and settle the options that go by layers
    and experts: ``frozen_layers`` and ``merge_experts``. Raises :class:`UserError` where they do not fit the model."""
    count, frozen = _count_layers(encoder), training_args.frozen_layers
    upper = range(2 * count // 3 if frozen is None else frozen, count)
    if not has_experts(encoder):
        if count and not upper and model_args.num_experts > 0 and model_args.moe_layers == "trained":
            raise OptionError("frozen_layers", f"found {frozen}, expected fewer than the encoder's {count} layers")
        try:
            if (config := config or model_args.moe_config(upper or None)) is not None:
                if type(encoder) not in MOE_CLASSES:
                    found = f"found {config.num_experts} and a {type(encoder).__name__}"
                    raise OptionError("num_experts", f"{found}, expected 0: only XLM-R, RoBERTa and BERT have experts")
                inject_moe(encoder, config)
        except ValueError as error:
            raise UserError(f"{at(model_args.model_name_or_path)}: {error}") from None
    if frozen is None:
        with_experts = [index for index, _, _ in layer_states(encoder)] if has_experts(encoder) else []
        training_args.frozen_layers = min(with_experts, default=upper.start)
    if training_args.merge_experts is None:
        training_args.merge_experts = has_experts(encoder) and training_args.trainable != "lora"
    if training_args.merge_experts and not has_experts(encoder):
        raise OptionError("merge_experts", "found no experts to merge, expected num_experts above 0")
    if training_args.merge_experts and training_args.merge_adapter:
        raise OptionError("merge_adapter", "found true, expected false with merge_experts, which merges both")


def give_experts(
    encoder: PreTrainedModel,
    model_args: CLPLModelArguments,
    data_args: CLPLDataArguments,
    training_args: CLPLTrainingArguments,
) -> None:
    """Check the experts that are given for data and evaluation, and choose the latter; raises :class:`OptionError`."""
    experts, of_dev = data_args.experts_of_data or [], training_args.dev_expert
    for name, given in (("experts_of_data", experts), ("dev_expert", [] if of_dev is None else [of_dev])):
        for expert in given:
            choose_or_refuse(encoder, expert, name)
    if model_args.router == "given" and not experts and model_args.num_experts > 0:
        raise OptionError("experts_of_data", "found none, expected one for each entry of train_data, for router given")
    if experts:
        choose_expert(encoder, of_dev or 0)
        if training_args.weight_decay > 0:
            raise OptionError("weight_decay", "changes experts that no text goes to, expected 0 with experts_of_data")
        if not packs(encoder, training_args):
            raise OptionError("experts_of_data", "found padded batches, expected packing and no unified_finetuning")


def packs(encoder: PreTrainedModel, args: CLPLTrainingArguments) -> bool:
    """Whether batches are packed."""
    # Sparse and multi-vector losses need the states of all tokens, in rows.
    whole = args.unified_finetuning or (args.sub_batch_size or -1) > 0
    # Gradient caching cuts packed batches, also for encoders that pad them after all.
    wanted = args.grad_cache_tokens is not None or (args.packing and can_pack(encoder))
    return wanted and not whole


def _count_layers(encoder: PreTrainedModel) -> int:
    """How many layers could have experts or be frozen; 0 in encoders of other kinds."""
    try:
        return len(find_layers(encoder))
    except ValueError:
        return 0


def choose_trainable(encoder: PreTrainedModel, args: CLPLTrainingArguments) -> None:
    """Leave gradients only where ``trainable``, ``frozen_layers`` and FlagEmbedding's ``fix_*`` options want them, with
    ``trainable`` lora in adapters; raises :class:`UserError` where the encoder has no such experts or layers, or nothing would
    be trained."""
    if args.trainable == "moe" and not has_experts(encoder):
        raise UserError(
            "trainable is moe but the model has no experts: set num_experts to 2 or more, or trainable to full"
        )
    frozen = args.frozen_layers or 0
    try:
        if args.trainable == "lora":
            add_lora(encoder, args)
        elif args.trainable != "full":
            chosen = expert_parameters(encoder) if args.trainable == "moe" else ffn_parameters(encoder)
            encoder.requires_grad_(False)
            for _, parameter in chosen:
                parameter.requires_grad_(True)
        layers = find_layers(encoder) if frozen else []
    except ValueError as error:
        raise UserError(str(error)) from None
    if frozen > len(layers):
        raise UserError(f"frozen_layers is {frozen}: found {len(layers)} layers in the encoder")
    for name, parameter in encoder.named_parameters():
        positions = args.fix_position_embedding and "position_embeddings" in name
        # Nothing that is trained uses the pooling layer.
        if args.fix_encoder or positions or name.startswith("pooler."):
            parameter.requires_grad_(False)
    if frozen:
        # ELECTRA's projection of its embeddings lies below the layers, too.
        below = (getattr(encoder, name, None) for name in ("embeddings", "embeddings_project"))
        for part in (*filter(None, below), *layers[:frozen]):
            part.requires_grad_(False)
    if not args.unified_finetuning and not any(parameter.requires_grad for parameter in encoder.parameters()):
        raise UserError(
            "nothing would be trained: fix_encoder without unified_finetuning, or frozen_layers, leaves no parameters"
        )


def cached_layers(encoder: PreTrainedModel, args: CLPLTrainingArguments) -> int:
    """How many of the lowest layers ``frozen_cache_gb`` spares an encoder whose trained parameters have been chosen: frozen ones
    without experts. Raises :class:`OptionError` where there are none."""
    if not args.frozen_cache_gb:
        return 0
    if not can_pack(encoder):
        raise OptionError(
            "frozen_cache_gb",
            f"found a {type(encoder).__name__}, expected 0: only XLM-R, RoBERTa and BERT are packed",
        )
    with_experts, count = {number for number, _, _ in layer_states(encoder)}, 0
    for number, part in enumerate([encoder.embeddings, *find_layers(encoder)]):
        if any(parameter.requires_grad for parameter in part.parameters()) or number - 1 in with_experts:
            break
        count = number
    if count == 0:
        raise OptionError(
            "frozen_cache_gb",
            "found no frozen layer without experts at the bottom, expected frozen_layers, with experts moe_layers further up, or 0",
        )
    return count


def make_frozen_cache(encoder: PreTrainedModel, args: CLPLTrainingArguments) -> FrozenCache | None:
    """The cache that ``frozen_cache_gb`` asks for; :class:`UserError` where it does not fit the model or the machine."""
    if not (layers := cached_layers(encoder, args)):
        return None
    # What is computed in half precision needs no more digits than float16 has; layer norm keeps states in its range.
    dtype = torch.float16 if args.bf16 or args.fp16_asked else torch.float32
    return FrozenCache(layers, encoder.config.hidden_size, int(args.frozen_cache_gb * 1e9), dtype=dtype)
