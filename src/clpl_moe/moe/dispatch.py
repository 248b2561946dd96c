"""How tokens get to their experts and back.

With T tokens, N experts and ``top_k`` = k there are S = T·k slots, one for each token and expert that it goes to.

- **Sorted** (k < N): slots are sorted by expert, so that each expert owns one contiguous part. This adds one gather of
  tokens and one of results, and the same two in the backward pass: the permutation is kept together with its inverse.
- **Mixed** (k = N): every expert sees every token, hence nothing is sorted, and the weighted sum over the experts
  is accumulated by the matrix products themselves.

:mod:`.kernel_choice` decides how the experts are then computed, :mod:`.experts` computes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass
class Assignment:
    """Which tokens go to which expert, with what weight."""

    weights: Tensor  # (T, k) in at least float32, of each assignment; column e is expert e where mixed
    counts: Tensor  # (N,) int64, number of tokens of each expert
    order: Tensor | None = None  # (S,) int64, the assignment (t·k + its rank) in each sorted slot; None where mixed
    inverse: Tensor | None = None  # (S,) int64, the slot of each assignment; None where mixed
    unit: bool = False  # whether all weights are 1 in value
    alone: int | Literal["mean"] | None = None  # the one expert that all tokens go to, or the mean of all

    @property
    def mixed(self) -> bool:
        """Whether every expert sees every token, unsorted."""
        return self.order is None

    @property
    def top_k(self) -> int:
        return self.weights.shape[1]

    @property
    def rows(self) -> Tensor:
        """(S,) int64, the token in each slot; not where mixed."""
        assert self.order is not None, "experts that see every token have no slots"
        return self.order if self.top_k == 1 else self.order // self.top_k

    @cached_property
    def sizes(self) -> list[int]:
        """``counts`` as numbers; waits for the device."""
        return self.counts.tolist()


def linear_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a Linear would compute ``x``: its own, or autocast's where that is on."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def cast(x: Tensor) -> Tensor:
    """``x`` in :func:`linear_dtype`, for what is not registered with autocast; differentiable."""
    return x.to(linear_dtype(x))


def assign(experts: Tensor, weights: Tensor, num_experts: int, *, unit: bool) -> Assignment:
    """Sort the assignments ``experts`` (T, k) by expert, those of one expert in the order of tokens."""
    flat = experts.flatten()  # (S,)
    # Not bincount, which waits for the device.
    counts = (flat.unsqueeze(1) == torch.arange(num_experts, device=flat.device)).sum(0)
    order = flat.argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    return Assignment(weights, counts, order, inverse, unit)


def gather(tokens: Tensor, assignment: Assignment) -> Tensor:
    """tokens (T, D) as the experts take them: slots (S, D); unchanged where mixed."""
    if assignment.mixed:
        return tokens
    return _Move.apply(cast(tokens), assignment.rows, assignment.inverse, assignment.top_k, True)


def gather_weights(assignment: Assignment) -> Tensor:
    """The weight of each slot, (S,); not where mixed."""
    return _Move.apply(assignment.weights.flatten(), assignment.order, assignment.inverse, 1, True)


def sum_slots(results: Tensor, assignment: Assignment) -> Tensor:
    """Results of slots (S, D), summed for each token: (T, D); not where mixed."""
    return _Move.apply(results, assignment.rows, assignment.inverse, assignment.top_k, False)


def restore(results: Tensor, assignment: Assignment, real: Tensor | None, count: int) -> Tensor:
    """Put weighed results (T, D) back in the batch's order: (count, D), zero at padding.

    ``real`` (T,) int64 are the tokens' places among the batch's ``count``; None where all are real.
    """
    is_sorted = not assignment.mixed and assignment.top_k == 1
    if real is None:
        return sum_slots(results, assignment) if is_sorted else results
    return _Place.apply(results, real.index_select(0, assignment.rows) if is_sorted else real, count, True)


def pick(hidden: Tensor, real: Tensor | None) -> Tensor:
    """The rows ``real`` (T,), each at most once, of hidden (..., D), flattened; all where None."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    return flat if real is None else _Place.apply(flat, real, len(flat), False)


# Indices are permutations or hold each row at most once, so that the inverse of a gather is a gather, too.
def _move(x: Tensor, rows: Tensor, inverse: Tensor, top_k: int, to_slots: bool) -> Tensor:
    if to_slots:
        return x.index_select(0, rows)
    x = x.index_select(0, inverse)
    if top_k == 1:
        return x
    first, second, *others = x.view(-1, top_k, *x.shape[1:]).unbind(1)
    total = first + second  # several times faster than sum(1) on CPUs
    for other in others:
        total += other
    return total


class _Move(torch.autograd.Function):
    """Tokens (T, …) to slots (S, …), or slots, summed for each token, to tokens: each is the gradient of the other."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor, inverse: Tensor, top_k: int, to_slots: bool) -> Tensor:
        ctx.save_for_backward(rows, inverse)
        ctx.top_k, ctx.to_slots = top_k, to_slots
        return _move(x, rows, inverse, top_k, to_slots)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, inverse = ctx.saved_tensors
        return _move(grad, rows, inverse, ctx.top_k, not ctx.to_slots), None, None, None, None


def _place(x: Tensor, places: Tensor, count: int, to_batch: bool) -> Tensor:
    return x.new_zeros(count, *x.shape[1:]).index_copy_(0, places, x) if to_batch else x.index_select(0, places)


class _Place(torch.autograd.Function):
    """Rows to their places in a batch of zeros, or back; torch's index_copy would keep the rows for its gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, places: Tensor, count: int, to_batch: bool) -> Tensor:
        ctx.save_for_backward(places)
        ctx.count, ctx.to_batch = count, to_batch
        return _place(x, places, count, to_batch)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        return _place(grad, places, ctx.count, not ctx.to_batch), None, None, None
