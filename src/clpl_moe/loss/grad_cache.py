"""Gradient caching: the gradients of a large batch in the memory of a small one.

A contrastive loss compares all texts of a batch, so that a batch cannot be cut into parts whose losses are added up, as
gradient accumulation does. But the loss depends on the encoder only through the embeddings, which are small:

1. Forward each chunk of texts without a graph, and keep the outputs and the random state that the chunk began with.
2. Compute the loss of all outputs, and its gradients with respect to them.
3. Forward each chunk again from its random state, now with a graph, and backpropagate its part of these gradients.

The gradients equal those of one pass over all chunks with graphs, dropout included. The cost is a second forward. Only
one chunk's activations exist at any time.

Steps 1 and 3 are the forward and backward of one autograd function whose inputs are the encoder's parameters. The loss and
``loss.backward()`` stay as they are, and every parameter's gradient arrives once, complete, from the graph:
DistributedDataParallel's hooks, gradient accumulation and gradient scalers rely on this.

Source: L. Gao, Y. Zhang, J. Han, J. Callan, "Scaling deep contrastive learning batch size under memory limited setup",
arXiv:2101.06983.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Chunk = TypeVar("Chunk")


def cached_forward(
    module: nn.Module, forward: Callable[[Chunk], tuple[Tensor, ...]], chunks: Sequence[Chunk]
) -> tuple[Tensor, ...]:
    """The outputs of ``forward`` for all chunks together; no chunk's activations are kept.

    Args:
        module: its parameters, and no others, get gradients.
        forward: calls ``module`` on one chunk and returns floating-point tensors, always the same number of them, that
            differ between chunks in the first dimension only. It is called a second time in the backward pass.
        chunks: whatever ``forward`` takes, at least one. Kept until the backward pass.

    Returns:
        The outputs of ``forward``, each concatenated over the chunks in their order. With one chunk nothing can be saved,
        and ``forward`` is called just once, with its graph.
    """
    if not chunks:
        raise ValueError("there are no chunks: expected at least one")
    if len(chunks) == 1:
        return forward(chunks[0])
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    return _CachedForward.apply(_Step(module, forward), list(trained), chunks, *trained.values())


class _CachedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, step: _Step, names: list[str], chunks: Sequence[Any], *parameters: Tensor) -> tuple[Tensor, ...]:
        device = next(step.module.parameters()).device
        ctx.step, ctx.names, ctx.chunks = step, names, chunks
        ctx.random_states, ctx.autocast = [], _autocast_like_now(device)
        # Not for their values: autograd then notices a parameter that is changed before the backward pass.
        ctx.save_for_backward(*parameters)
        outputs = []
        for chunk in chunks:
            ctx.random_states.append(_RandomState(device))
            outputs.append(step.forward_chunk(chunk))
        # Older versions of torch hand casts made here, which have no graph, to whoever computes with one in the same
        # autocast (pytorch/pytorch#158232).
        torch.clear_autocast_cache()
        ctx.sizes = [[output.shape[0] for output in of_chunk] for of_chunk in outputs]
        return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple[Any, ...]:
        # Gradients are collected in stand-ins that share the parameters' storage. In the parameters themselves, each
        # chunk would set off the hooks that wait for a complete gradient.
        stand_ins = [parameter.detach().requires_grad_() for parameter in ctx.saved_tensors]
        by_name = dict(zip((f"module.{name}" for name in ctx.names), stand_ins, strict=True))
        # (chunk, output) from (output, chunk)
        sizes_of_outputs = zip(*ctx.sizes, strict=True)
        parts = zip(*(g.split(list(s)) for g, s in zip(gradients, sizes_of_outputs, strict=True)), strict=True)
        for chunk, state, of_chunk in zip(ctx.chunks, ctx.random_states, parts, strict=True):
            with state.restored(), torch.enable_grad():
                torch.func.functional_call(ctx.step, by_name, (chunk, of_chunk, ctx.autocast))
        return None, None, None, *(stand_in.grad for stand_in in stand_ins)


class _Step(nn.Module):
    """One chunk's forward and backward in one call, during which ``functional_call`` swaps the module's parameters.
    Gradient checkpointing, which computes layers again within the backward, then sees the stand-ins too."""

    def __init__(self, module: nn.Module, forward: Callable[[Any], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.module = module
        self.forward_chunk = forward

    def forward(
        self, chunk: Any, gradients: tuple[Tensor, ...], autocast: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        with autocast():
            outputs = self.forward_chunk(chunk)
        pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad]
        if pairs:
            with_graph, their_gradients = zip(*pairs, strict=True)
            torch.autograd.backward(with_graph, their_gradients)


class _RandomState:
    """The random state of the CPU and of a device at this moment."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu = torch.get_rng_state()
        on_host = device.type in ("cpu", "meta")
        self.accelerator = None if on_host else torch.get_device_module(device).get_rng_state(device)

    @contextmanager
    def restored(self):
        """Within it, random numbers are drawn from this state; after it, as if nothing had been drawn."""
        here = {} if self.accelerator is None else {"device_type": self.device.type}
        with torch.random.fork_rng(devices=[self.device] if here else [], **here):
            torch.set_rng_state(self.cpu)
            if self.accelerator is not None:
                torch.get_device_module(self.device).set_rng_state(self.accelerator, self.device)
            yield


def _autocast_like_now(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Makes contexts with this moment's autocast settings, which the backward pass does not inherit."""
    enabled, dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    return lambda: torch.autocast(device.type, dtype=dtype, enabled=enabled)


def chunks_by_tokens(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Divide texts into chunks of at most ``budget`` tokens, counted as if each were as long as its chunk's longest.

    A longer text is a chunk by itself. Returns for each chunk the numbers of its texts. Texts go by length, longest first:
    those of a chunk are about equally long, and a chunk that does not fit into memory fails at once.
    """
    chunks: list[list[int]] = []
    longest = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if not chunks or (len(chunks[-1]) + 1) * longest > budget:
            chunks.append([])
            longest = lengths[row]
        chunks[-1].append(row)
    return chunks
