"""Put experts into an encoder's layers, and take them out."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, TypeGuard

from torch import Tensor, nn

from .config import MoEConfig
from .experts import Experts
from .layer import MoEFFNIntermediate, MoEFFNOutput, MoEIntermediate, MoEOutput, OutputHalf, RoutedOutput
from .layer_state import LayerState, add_padding_hooks, remove_padding_hooks
from .router import Router, router_class


class TransformerLayer(nn.Module):
    """What a layer of XLM-R, BERT or RoBERTa has, for type checkers; no such object is made."""

    attention: nn.Module
    intermediate: Any
    output: Any


def install_experts(encoder: nn.Module, config: MoEConfig) -> None:
    """Replace FFN Linear layers by experts that are copies of them, in place; raises as :func:`.inject.inject_moe` does."""
    if has_experts(encoder):
        raise ValueError("the encoder has experts already: merge_experts(model) makes it dense again")
    layers = find_layers(encoder)
    chosen = [layers[index] for index in config.resolve_layers(len(layers))]
    for layer in chosen:
        _check_layer(layer, config.target)
    _check_forward(encoder)
    add_padding_hooks(encoder, {layer.attention: _install_in_layer(layer, config) for layer in chosen})


def remove_experts(encoder: nn.Module, shares: Tensor | None = None) -> None:
    """Replace experts by Linear layers, in place; raises and takes ``shares`` as :func:`.inject.merge_experts` does."""
    if not has_experts(encoder):
        raise ValueError("the encoder has no experts to merge")
    routers = [(index, router) for index, _, router in layer_states(encoder)]
    expected = len(routers), len(routers[0][1].weight)
    if shares is not None and shares.shape != expected:
        raise ValueError(f"shares have shape {tuple(shares.shape)}, expected {expected}: layers with experts, experts")
    halves = [module for module in encoder.modules() if isinstance(module, (MoEIntermediate, OutputHalf))]
    if not all(isinstance(half.dense, Experts) for half in halves if not isinstance(half, RoutedOutput)):
        raise ValueError("the experts have adapters: merge these first (merge_and_unload of peft)")
    of_layer = {} if shares is None else dict(zip([index for index, _ in routers], shares, strict=True))
    for index, layer in enumerate(find_layers(encoder)):
        for name in ("intermediate", "output"):
            if isinstance(half := getattr(layer, name), (MoEIntermediate, OutputHalf)):
                setattr(layer, name, dense_half(half, of_layer.get(index)))
        remove_padding_hooks(layer.attention)
    remove_padding_hooks(encoder)


def dense_half(half: Any, shares: Tensor | None = None) -> nn.Module:
    """The module whose place a half with experts took, with the parts that the half has now and its experts merged."""
    dense: nn.Module = half.__dict__["dense_half"]
    for part in dict(dense.named_children()):
        setattr(dense, part, getattr(half, part))
    dense.dense = half.dense if isinstance(half, RoutedOutput) else half.dense.merged(shares)
    return dense.train(half.training)


def has_experts(model: nn.Module) -> bool:
    return any(isinstance(module, Experts) for module in model.modules())


def layer_states(encoder: nn.Module) -> list[tuple[int, LayerState, Router]]:
    """Number, shared state and router of each layer with experts, in order."""
    return [
        (index, half.state, half.router)
        for index, layer in enumerate(find_layers(encoder))
        for half in (layer.intermediate, layer.output)
        if hasattr(half, "router")
    ]


def find_layers(encoder: nn.Module) -> list[TransformerLayer]:
    """The transformer layers of an encoder, in order; raises :class:`ValueError` where there are none."""
    layers = [module for module in encoder.modules() if _is_layer(module)]
    if not layers:
        raise ValueError(
            f"{type(encoder).__name__} has no layers with attention, intermediate.dense and output.dense, as XLM-R, BERT"
            " and RoBERTa have: it can have neither experts nor frozen_layers"
        )
    return layers


def _is_layer(module: nn.Module) -> TypeGuard[TransformerLayer]:
    has_parts = all(hasattr(module, name) for name in ("attention", "intermediate", "output"))
    return has_parts and hasattr(module.intermediate, "dense") and hasattr(module.output, "dense")


# What the halves of a layer consist of that experts can take the place of.
_INTERMEDIATE = {"dense", "intermediate_act_fn"}
_OUTPUT = {"dense", "dropout", "LayerNorm"}


def _unfit(module: nn.Module, parts: set[str]) -> str | None:
    """What the module consists of, where that is not ``parts``."""
    found = {part for part, _ in module.named_children()}
    # An activation may be a plain function, which is no child.
    if found <= parts and all(hasattr(module, part) for part in parts):
        return None
    return f"{type(module).__name__} consists of {', '.join(sorted(found))}, expected {', '.join(sorted(parts))}"


def _check_layer(layer: TransformerLayer, target: str) -> None:
    for half, parts, other in ((layer.intermediate, _INTERMEDIATE, "output"), (layer.output, _OUTPUT, "intermediate")):
        if target == other:
            continue
        if problem := _unfit(half, parts):
            raise ValueError(f"{problem}, as in XLM-R, BERT and RoBERTa: experts cannot take its place")
        if not isinstance(half.dense, nn.Linear) or half.dense.bias is None:
            raise ValueError(
                f"{type(half).__name__}.dense is {half.dense}, expected a Linear with bias: experts are put in before"
                " adapters and quantization"
            )
    if getattr(layer, "chunk_size_feed_forward", 0):
        raise ValueError("experts see whole batches: set the encoder's chunk_size_feed_forward to 0")


def _check_forward(encoder: nn.Module) -> None:
    parameters = inspect.signature(encoder.forward).parameters
    takes_more = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if "attention_mask" not in parameters or not takes_more:
        raise ValueError(
            f"{type(encoder).__name__}.forward does not take attention_mask and further keyword arguments, so that its"
            " layers cannot be told which tokens are padding: give the transformers encoder inside it, if there is one"
        )


def _install_in_layer(layer: TransformerLayer, config: MoEConfig) -> LayerState:
    """Put experts in the place of the layer's halves that ``config.target`` names; returns their state."""
    first, second, state = layer.intermediate, layer.output, LayerState(chosen=config.expert)
    router = _make_router(second.dense if config.target == "output" else first.dense, config)
    experts = partial(Experts.from_linear, num_experts=config.num_experts)
    new: dict[str, nn.Module] = {}
    if config.target == "intermediate":
        # An output module of another build gets what it got from the dense layer.
        hands_over = _unfit(second, _OUTPUT) is None
        new["intermediate"] = MoEIntermediate(
            router, experts(first.dense), first.intermediate_act_fn, state, hands_over
        )
        if hands_over:
            new["output"] = RoutedOutput(second.dense, second.dropout, second.LayerNorm, state)
    elif config.target == "output":
        new["output"] = MoEOutput(experts(second.dense), second.dropout, second.LayerNorm, state, router)
    else:
        new["intermediate"] = MoEFFNIntermediate(router, experts(first.dense), first.intermediate_act_fn, state)
        new["output"] = MoEFFNOutput(experts(second.dense), second.dropout, second.LayerNorm, state)
    for name, half in new.items():
        dense = getattr(layer, name)
        dense.dense = None
        # For the way back; no submodule, since its other parts are the new half's, too.
        half.__dict__["dense_half"] = dense
        setattr(layer, name, half.train(layer.training))
    return state


def _make_router(dense: nn.Linear, config: MoEConfig) -> Router:
    """A router for experts that are copies of ``dense``, with its device and dtype."""
    router = router_class(config.router)(dense.in_features, config.num_experts, config.top_k)
    router.to(device=dense.weight.device, dtype=dense.weight.dtype)
    if router.weight.device.type != "meta":
        router.reset_parameters(config.router_init_std)
    return router
