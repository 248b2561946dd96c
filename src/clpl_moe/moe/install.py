"""Install experts in an encoder's layers, with the hooks that tell them which tokens are padding, and take them out."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from .config import MoEConfig
from .layer import (
    Experts,
    LayerState,
    MoEFFNIntermediate,
    MoEFFNOutput,
    MoEIntermediate,
    MoEOutput,
    RoutedOutput,
    Router,
)

# The name under which an encoder passes the real tokens down to its layers.
_TOKENS = "moe_tokens"


def install_experts(encoder: nn.Module, config: MoEConfig) -> None:
    """Replace FFN Linear layers of ``encoder`` by experts that are copies of them; in place.

    Raises:
        ValueError: no fitting layers, experts are there already, or ``config.layers`` does not fit the encoder.
    """
    if has_experts(encoder):
        raise ValueError("the encoder has experts already: merge_experts(model) makes it dense again")
    layers = find_layers(encoder)
    chosen = config.resolve_layers(len(layers))
    for index in chosen:
        _check_layer(layers[index], config.target)
    _check_forward(encoder)
    for index in chosen:
        _install_in_layer(layers[index], config)
    states = [state for _, state, _ in layer_states(encoder)]
    encoder.register_forward_pre_hook(_PassTokens(states), with_kwargs=True)
    encoder.register_forward_hook(_EndCall(states), always_call=True)


def remove_experts(encoder: nn.Module) -> None:
    """Replace experts by Linear layers with their mean; in place.

    Raises:
        ValueError: the encoder has no experts.
    """
    if not has_experts(encoder):
        raise ValueError("the encoder has no experts to merge")
    for layer in find_layers(encoder):
        if isinstance(layer.intermediate, MoEIntermediate):
            layer.intermediate = _Dense(layer.intermediate)
        if isinstance(layer.output, (MoEOutput, MoEFFNOutput, RoutedOutput)):
            layer.output = _DenseOutput(layer.output)
        _remove_hooks(layer.attention)
    _remove_hooks(encoder)


def has_experts(model: nn.Module) -> bool:
    """Whether any module of ``model`` holds experts."""
    return any(isinstance(module, Experts) for module in model.modules())


def layer_states(encoder: nn.Module) -> list[tuple[int, LayerState, Router]]:
    """Number, shared state and router of each layer with experts, in order."""
    return [
        (index, module.state, module.router)
        for index, layer in enumerate(find_layers(encoder))
        for module in (layer.intermediate, layer.output)
        if hasattr(module, "router")
    ]


def find_layers(encoder: nn.Module) -> list[nn.Module]:
    """The transformer layers of an encoder, in order.

    Raises:
        ValueError: no module has ``attention``, ``intermediate.dense`` and ``output.dense``.
    """
    layers = [
        module
        for module in encoder.modules()
        if all(hasattr(module, name) for name in ("attention", "intermediate", "output"))
        and hasattr(module.intermediate, "dense")
        and hasattr(module.output, "dense")
    ]
    if not layers:
        raise ValueError(
            f"{type(encoder).__name__} has no layers with attention, intermediate.dense and output.dense, as XLM-R, BERT"
            " and RoBERTa have: it can have neither experts nor frozen_layers"
        )
    return layers


_INTERMEDIATE = {"dense", "intermediate_act_fn"}
_OUTPUT = {"dense", "dropout", "LayerNorm"}


def _unfit(module: nn.Module, parts: set[str]) -> str | None:
    """What the module consists of, where that is not ``parts``."""
    found = {part for part, _ in module.named_children()}
    # An activation may be a plain function, which is no child.
    if found <= parts and all(hasattr(module, part) for part in parts):
        return None
    return f"{type(module).__name__} consists of {', '.join(sorted(found))}, expected {', '.join(sorted(parts))}"


def _check_layer(layer: nn.Module, target: str) -> None:
    replaced = {"intermediate": _INTERMEDIATE, "output": _OUTPUT}
    for name in replaced if target == "ffn" else (target,):
        module = getattr(layer, name)
        problem = _unfit(module, replaced[name])
        if problem is not None:
            raise ValueError(f"{problem}, as in XLM-R, BERT and RoBERTa: experts cannot take its place")
        if not isinstance(module.dense, nn.Linear) or module.dense.bias is None:
            raise ValueError(
                f"{type(module).__name__}.dense is {module.dense}, expected a Linear with bias: experts are put in before"
                " adapters and quantization"
            )
    if getattr(layer, "chunk_size_feed_forward", 0):
        raise ValueError("experts see whole batches: set the encoder's chunk_size_feed_forward to 0")


def _check_forward(encoder: nn.Module) -> None:
    parameters = inspect.signature(encoder.forward).parameters
    if "attention_mask" not in parameters or not any(
        p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()
    ):
        raise ValueError(
            f"{type(encoder).__name__}.forward does not take attention_mask and further keyword arguments, so that its"
            " layers cannot be told which tokens are padding: give the transformers encoder inside it, if there is one"
        )


def _install_in_layer(layer: nn.Module, config: MoEConfig) -> None:
    intermediate, output, state = layer.intermediate, layer.output, LayerState()
    routed = output.dense if config.target == "output" else intermediate.dense
    router = Router(routed.in_features, config.num_experts, config.top_k, config.router)
    router.to(device=routed.weight.device, dtype=routed.weight.dtype)
    if router.weight.device.type != "meta":
        router.reset_parameters(config.router_init_std)

    def experts(linear: nn.Linear) -> Experts:
        return Experts.from_linear(linear, config.num_experts)

    if config.target == "intermediate":
        # An output module of another build gets what it got from the dense layer.
        hands_over = _unfit(output, _OUTPUT) is None
        layer.intermediate = MoEIntermediate(
            router, experts(intermediate.dense), intermediate.intermediate_act_fn, state, hands_over
        )
        if hands_over:
            layer.output = RoutedOutput(output.dense, output.dropout, output.LayerNorm, state)
    elif config.target == "output":
        layer.output = MoEOutput(router, experts(output.dense), output.dropout, output.LayerNorm, state)
    else:
        layer.intermediate = MoEFFNIntermediate(
            router, experts(intermediate.dense), intermediate.intermediate_act_fn, state
        )
        layer.output = MoEFFNOutput(experts(output.dense), output.dropout, output.LayerNorm, state)
    for module in (layer.intermediate, layer.output):
        module.train(layer.training)
    layer.attention.register_forward_pre_hook(_TakeTokens(state), with_kwargs=True)


class _PassTokens:
    """Before an encoder's forward: tells its layers which tokens are real.

    The tokens travel as a keyword argument rather than as an attribute, since gradient checkpointing runs a layer again
    in the backward pass, when other batches have gone through: arguments are then the original ones.
    """

    def __init__(self, states: list[LayerState]) -> None:
        self.states = states

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        for state in self.states:
            state.set_running(True)
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        tokens = None
        # A number that only the device knows: on CUDA this waits for it, once a batch, and only where a mask is given.
        if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all()):
            tokens = mask.flatten().nonzero().squeeze(1)
        return args, {**kwargs, _TOKENS: tokens}


class _EndCall:
    """After an encoder's forward, also one that failed."""

    def __init__(self, states: list[LayerState]) -> None:
        self.states = states

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        for state in self.states:
            state.set_running(False)


class _TakeTokens:
    """Before a layer's attention: keeps the real tokens for the layer's experts; attention does not see them."""

    def __init__(self, state: LayerState) -> None:
        self.state = state

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if self.state.is_running() and _TOKENS not in kwargs:
            raise RuntimeError(
                "the encoder does not hand keyword arguments down to its layers, so that they cannot be told which tokens"
                " are padding: experts do not work in it"
            )
        self.state.set_tokens(kwargs.pop(_TOKENS, None))
        return args, kwargs


_HOOKS = (_PassTokens, _EndCall, _TakeTokens)


def _remove_hooks(module: nn.Module) -> None:
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(hook, _HOOKS)]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)


class _Dense(nn.Module):
    """A dense ``intermediate`` with merged weights."""

    def __init__(self, moe: MoEIntermediate) -> None:
        super().__init__()
        self.dense = moe.dense.merged()
        self.intermediate_act_fn = moe.intermediate_act_fn

    def forward(self, hidden: Tensor) -> Tensor:
        return self.intermediate_act_fn(self.dense(hidden))


class _DenseOutput(nn.Module):
    """A dense ``output``, with merged weights where it had experts."""

    def __init__(self, moe: MoEOutput | MoEFFNOutput | RoutedOutput) -> None:
        super().__init__()
        self.dense = moe.dense.merged() if isinstance(moe.dense, Experts) else moe.dense
        self.dropout = moe.dropout
        self.LayerNorm = moe.LayerNorm

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden)) + residual)
