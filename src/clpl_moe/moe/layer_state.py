"""What the modules of one layer share during a forward pass, and the hooks that tell them which tokens are padding.

An encoder hands its layers no two-dimensional mask. So a hook before its forward passes the indices of the real tokens
down as a keyword argument, with which gradient checkpointing also repeats a layer when other batches have gone through.
A hook before each layer's attention takes them out again and keeps them for the layer's experts.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_TOKENS = "moe_tokens"  # the name under which an encoder passes the real tokens down to its layers


class RouterRecord(NamedTuple):
    """What one call of one router leaves for losses and logs; N experts, sums over tokens."""

    counts: Tensor  # (N,) float32, assignments to each expert
    probability_sums: Tensor  # (N,) with a graph, of each expert's softmax probability
    z_sum: Tensor  # scalar with a graph, of the squared log-sum-exp of the logits


class LayerState:
    """What a layer's attention and feed-forward modules share: which tokens are real, and the router's records.

    Threads can share a model: each has its own forward pass. Copies and pickles start without it and without records.
    """

    def __init__(self, tracking: bool = False, chosen: int = 0) -> None:
        self.chosen = chosen  # the expert of all texts, where the router has them given and no text has its own
        self.tracking = tracking  # whether training forwards leave records; off, since records hold on to the graph
        self.records: list[RouterRecord] = []
        # (N,) for each call of the router, what each expert got; None while nobody counts
        self.loads: list[Tensor] | None = None
        self._pass = threading.local()

    # torch.compile takes values of one thread for constants: it has to leave these to Python.

    @torch.compiler.disable
    def get_tokens(self) -> Tensor | None:
        """Indices of the real tokens in the flattened batch; None where all are real."""
        return getattr(self._pass, "tokens", None)

    @torch.compiler.disable
    def set_tokens(self, tokens: Tensor | None, experts: Tensor | None = None) -> None:
        """Set what :meth:`get_tokens` returns; of a packed stream also each token's given expert, (T,) int64."""
        self._pass.tokens = tokens
        self._pass.experts = experts

    @torch.compiler.disable
    def get_experts(self) -> Tensor | None:
        """The expert that is given for each token of a packed stream, (T,) int64; None where none is given."""
        return getattr(self._pass, "experts", None)

    @torch.compiler.disable
    def is_running(self) -> bool:
        """Whether the encoder's own pass is under way, and not what gradient checkpointing repeats of it."""
        return getattr(self._pass, "running", False)

    @torch.compiler.disable
    def set_running(self, running: bool) -> None:
        self._pass.running = running

    def take_tokens(self, attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Hook before the layer's attention: keeps the real tokens, which attention does not take."""
        if self.is_running() and _TOKENS not in kwargs:
            raise RuntimeError(
                "the encoder does not hand keyword arguments down to its layers, so that they cannot be told which tokens"
                " are padding: experts do not work in it"
            )
        self.set_tokens(kwargs.pop(_TOKENS, None))
        return args, kwargs

    def __reduce__(self) -> tuple:
        return LayerState, (self.tracking, self.chosen)


class EncoderHooks:
    """The hooks of an encoder whose layers have these states."""

    def __init__(self, states: list[LayerState]) -> None:
        self.states = states

    def begin(self, encoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Before the encoder's forward: passes the real tokens down."""
        for state in self.states:
            state.set_running(True)
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        tokens = None
        # A number that only the device knows: on CUDA this waits for it, once a batch, and only where a mask is given.
        if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all()):
            tokens = mask.flatten().nonzero().squeeze(1)
        return args, {**kwargs, _TOKENS: tokens}

    def end(self, encoder: nn.Module, args: tuple, output: Any) -> None:
        """After the encoder's forward, also one that failed."""
        for state in self.states:
            state.set_running(False)


def add_padding_hooks(encoder: nn.Module, attentions: dict[nn.Module, LayerState]) -> None:
    """Let an encoder tell the layers with these attention modules, each with its layer's state, about padding."""
    hooks = EncoderHooks(list(attentions.values()))
    encoder.register_forward_pre_hook(hooks.begin, with_kwargs=True)
    encoder.register_forward_hook(hooks.end, always_call=True)
    for attention, state in attentions.items():
        attention.register_forward_pre_hook(state.take_tokens, with_kwargs=True)


def remove_padding_hooks(module: nn.Module) -> None:
    """Take these hooks off an encoder or an attention module."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", None), (EncoderHooks, LayerState)):
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)
