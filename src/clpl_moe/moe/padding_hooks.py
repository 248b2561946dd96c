"""Hooks that tell the layers of an encoder which tokens are padding: an encoder hands its layers no two-dimensional mask."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .layer_state import LayerState

# The name under which an encoder passes the real tokens down to its layers.
_TOKENS = "moe_tokens"


def add_padding_hooks(encoder: nn.Module, attentions: dict[nn.Module, LayerState]) -> None:
    """Let an encoder tell the layers with these attention modules, each with its layer's state, about padding."""
    states = list(attentions.values())
    encoder.register_forward_pre_hook(PassTokens(states), with_kwargs=True)
    encoder.register_forward_hook(EndCall(states), always_call=True)
    for attention, state in attentions.items():
        attention.register_forward_pre_hook(TakeTokens(state), with_kwargs=True)


def remove_padding_hooks(module: nn.Module) -> None:
    """Take the hooks of this file off an encoder or an attention module."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(hook, (PassTokens, EndCall, TakeTokens))]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)


class PassTokens:
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


class EndCall:
    """After an encoder's forward, also one that failed."""

    def __init__(self, states: list[LayerState]) -> None:
        self.states = states

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        for state in self.states:
            state.set_running(False)


class TakeTokens:
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
