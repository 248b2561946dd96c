"""Put experts into an encoder, merge them back into dense layers, and name the parameters that are trained."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import torch
from torch import Tensor, nn

from .config import MoEConfig
from .experts import Experts
from .install import has_experts, install_experts, layer_states, remove_experts
from .modeling_clpl_moe import MoEModel, become_dense, become_moe, register_classes
from .router import Given, Router

# Whoever injects or loads experts with this package may load the saved folder with AutoModel afterwards.
register_classes()

# An nn.Module, or what has one as its `base_model`, as clpl_moe.Encoder has.
Model = TypeVar("Model")


def inject_moe(model: Model, config: MoEConfig) -> Model:
    """Replace FFN Linear layers of an encoder by experts that are copies of them; in place, returns ``model``.

    Right afterwards the encoder computes what it computed before. A stock XLM-R, RoBERTa or BERT model also becomes an
    instance of the matching class of :mod:`clpl_moe.moe.modeling_clpl_moe`, so that ``save_pretrained`` writes a folder
    that loads without this package. ``model`` may be an encoder whose layers have ``intermediate.dense`` and
    ``output.dense`` as these have, a model around one, or a ``clpl_moe.Encoder``.

    Raises:
        ValueError: no such layers were found, the encoder has experts already, or ``config.layers`` does not fit it.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> small = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
        >>> model = inject_moe(BertModel(small), MoEConfig(num_experts=4, top_k=2))
        >>> model.encoder.layer[0].intermediate.dense
        Experts(num_experts=4, in_features=8, out_features=16)
    """
    encoder = encoder_of(model)
    install_experts(encoder, config)
    become_moe(encoder, config)
    return model


def merge_experts(model: Model, shares: Tensor | None = None) -> Model:
    """Make an encoder with experts dense again, each Linear the mean of its experts; in place, returns ``model``.

    With ``shares`` (L, N), for L layers with N experts, experts are weighted by their layer's row, which sums to 1, such as
    the load that :func:`clpl_moe.moe.balance.measure_load` finds.

    Raises:
        ValueError: the encoder has no experts, those of a folder's own code, or some with adapters; ``shares`` have another shape.
    """
    encoder = encoder_of(model)
    refuse_foreign_experts(encoder)
    remove_experts(encoder, shares)
    become_dense(encoder)
    return model


def takes_expert(model: object) -> bool:
    """Whether an expert of a model can be chosen: it has some, with router ``given``."""
    encoder = encoder_of(model)
    layers = layer_states(encoder) if has_experts(encoder) else []
    return bool(layers) and all(isinstance(router, Given) for _, _, router in layers)


def choose_expert(model: Model, expert: int) -> Model:
    """Let all texts go to one expert of an encoder with router ``given``, from 0; in place, returns ``model``.

    A folder that is saved then remembers the choice. Texts of a training step keep the experts of their data files.

    Raises:
        ValueError: the encoder has no such expert, or another router.
    """
    encoder = encoder_of(model)
    refuse_foreign_experts(encoder)
    if not takes_expert(encoder):
        raise ValueError("the encoder has no experts with router given, of which one could be chosen")
    layers = layer_states(encoder)
    count = len(layers[0][2].weight)
    if not 0 <= expert < count:
        raise ValueError(f"expert is {expert}: choose a number from 0 to {count - 1}")
    for _, state, _ in layers:
        state.chosen = expert
    if isinstance(encoder, MoEModel):
        config = MoEConfig(**(encoder.config.moe or {}))
        encoder.config.update({"moe": dataclasses.replace(config, expert=expert).to_dict()})
    return model


def encoder_of(model: object) -> nn.Module:
    """The encoder within a model, a ``clpl_moe.Encoder``, or itself; raises :class:`TypeError` where there is none."""
    encoder = getattr(model, "base_model", model)
    if not isinstance(encoder, nn.Module):
        raise TypeError(f"expected an encoder or a model around one, found {type(model).__name__}")
    return encoder


def refuse_foreign_experts(encoder: nn.Module) -> None:
    """Raise :class:`ValueError` for an encoder whose experts are of the code in its folder, and not of this package."""
    config = getattr(encoder, "config", None)
    if isinstance(getattr(config, "moe", None), dict) and not has_experts(encoder):
        raise ValueError(
            "the encoder was loaded with the code in its folder: use clpl_moe.load_encoder, or call clpl_moe.register()"
            " before AutoModel loads it"
        )


def expert_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters of experts and routers; empty where the model has none."""
    refuse_foreign_experts(encoder_of(model))
    prefixes = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, (Experts, Router)))
    return [(name, p) for name, p in model.named_parameters() if name.startswith(prefixes)]


def ffn_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters of all FFN Linear layers, dense or experts, and of routers."""
    ends = ("intermediate.dense", "output.dense", ".router")
    named = [(name, p) for name, p in model.named_parameters() if ".attention." not in name]
    return [(name, p) for name, p in named if name.rpartition(".")[0].endswith(ends)]


def stack_2024_experts(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename and stack the experts of a 2024-format state dict to the names used here; other entries pass through.

    ``….dense.experts.{j}.weight|bias`` become ``….dense.weight|bias`` (N, …), ``….dense.gate.weight`` ``….router.weight``.
    """
    stacked: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for name, value in state_dict.items():
        name = name.removeprefix("model.")
        owner, marker, rest = name.partition(".dense.experts.")
        if marker:
            index, _, kind = rest.partition(".")
            experts.setdefault(f"{owner}.dense.{kind}", {})[int(index)] = value
        else:
            stacked[name.replace(".dense.gate.weight", ".router.weight")] = value
    return stacked | {name: torch.stack([parts[i] for i in sorted(parts)]) for name, parts in experts.items()}
