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

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass
class Assignment:
    """Which tokens go to which expert, with what weight.

    Attributes:
        weights: (T, k) in at least float32, the weight of each assignment; column e is expert e where mixed.
        counts: (N,) int64, number of tokens of each expert.
        order: (S,) int64, the assignment (t·k + its rank) in each sorted slot; None where mixed.
        inverse: (S,) int64, the slot of each assignment; None where mixed.
        unit: whether all weights are 1 in value.
    """

    weights: Tensor
    counts: Tensor
    order: Tensor | None = None
    inverse: Tensor | None = None
    unit: bool = False

    @property
    def mixed(self) -> bool:
        """Whether every expert sees every token, unsorted."""
        return self.order is None

    @property
    def top_k(self) -> int:
        """Experts of each token."""
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
    """What a Linear would compute with ``x`` in: its own dtype, or autocast's where that is on."""
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
    return _Gather.apply(cast(tokens), assignment.rows, assignment.inverse, assignment.top_k)


def gather_weights(assignment: Assignment) -> Tensor:
    """The weight of each slot, (S,); not where mixed."""
    return _Gather.apply(assignment.weights.flatten(), assignment.order, assignment.inverse, 1)


def sum_slots(results: Tensor, assignment: Assignment) -> Tensor:
    """Results of slots (S, D), summed for each token: (T, D); not where mixed."""
    return _Sum.apply(results, assignment.rows, assignment.inverse, assignment.top_k)


def restore(results: Tensor, assignment: Assignment, real: Tensor | None, count: int) -> Tensor:
    """Put weighed results (T, D) back in the batch's order: (count, D), zero at padding.

    ``real`` (T,) int64 are the tokens' places among the batch's ``count``; None where all are real.
    """
    is_sorted = not assignment.mixed and assignment.top_k == 1
    if real is None:
        return _Sum.apply(results, assignment.rows, assignment.inverse, 1) if is_sorted else results
    places = real.index_select(0, assignment.rows) if is_sorted else real
    return results.new_zeros(count, *results.shape[1:]).index_copy_(0, places, results)


def pick(hidden: Tensor, real: Tensor) -> Tensor:
    """The rows ``real`` (T,), each at most once, of hidden (M, D)."""
    return _Pick.apply(hidden, real)


# In what follows, indices are permutations or hold each row at most once, so that the inverse of a gather is a gather, too.


def _sum(slots: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    slots = slots.index_select(0, inverse)
    if top_k == 1:
        return slots
    first, second, *others = slots.view(-1, top_k, *slots.shape[1:]).unbind(1)
    total = first + second  # several times faster than sum(1) on CPUs
    for other in others:
        total += other
    return total


class _Gather(torch.autograd.Function):
    """Tokens (T, …) to slots (S, …)."""

    @staticmethod
    def forward(ctx, tokens: Tensor, rows: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.top_k = top_k
        return tokens.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return _sum(grad, inverse, ctx.top_k), None, None, None


class _Sum(torch.autograd.Function):
    """Slots (S, …), summed for each token, to (T, …)."""

    @staticmethod
    def forward(ctx, slots: Tensor, rows: Tensor, inverse: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(rows)
        return _sum(slots, inverse, top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        return grad.index_select(0, rows), None, None, None


class _Pick(torch.autograd.Function):
    """Some rows of a batch; the gradient of the others is zero."""

    @staticmethod
    def forward(ctx, batch: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.count = batch.shape[0]
        return batch.index_select(0, places)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        return grad.new_zeros(ctx.count, *grad.shape[1:]).index_copy_(0, places, grad), None
