"""How tokens get to their experts and back, and how the experts' Linear layers are computed.

With T tokens, N experts and ``top_k`` = k there are S = T·k slots, one for each token and expert that it goes to.

- **Sorted** (k < N): slots are sorted by expert, so that each expert owns one contiguous part, and the arithmetic is that of
  the dense layer times k. Beside it stand one gather of tokens and one of results, and the same two in the backward pass:
  the permutation is kept together with its inverse, so that nothing is ever scattered.
- **In kernels of our own** (k = 1, in bfloat16 on CUDA, :mod:`.kernels`): sorted, with fewer passes over the tokens.
- **Mixed** (k = N): every expert sees every token, hence nothing is sorted, and the weighted sum over the experts
  is accumulated by the matrix products themselves.

A weight multiplies the input of an expert and not its output, ``w · (W x + b) = W (w x) + w b``. Then the gradient of
the weight is ``(Wᵀ g) · x + g · b`` for the gradient ``g`` of the output: what the backward pass computes anyway,
multiplied with what it keeps anyway. Outputs are not saved for it. Weights that are 1 in value (straight-through, k = 1)
multiply nothing, and still get this gradient.

Nothing here waits for the device, except :attr:`Assignment.sizes` on CUDA where there is no grouped kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import GELUActivation

try:
    # By their full names: they stay behind when this file travels with a model's weights.
    from clpl_moe.moe.kernels import routed_gelu
    from clpl_moe.moe.triton_support import can_compile
except ImportError:  # no Triton, as in torch's CPU builds
    routed_gelu = None


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
    _sizes: list[int] | None = field(default=None, repr=False)

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
        return self.order if self.top_k == 1 else self.order // self.top_k

    @property
    def sizes(self) -> list[int]:
        """``counts`` as numbers; waits for the device."""
        if self._sizes is None:
            self._sizes = self.counts.tolist()
        return self._sizes


def linear_dtype(x: Tensor) -> torch.dtype:
    """What a Linear would compute with ``x`` in: its own dtype, or autocast's where that is on."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def cast(x: Tensor) -> Tensor:
    """``x`` in :func:`linear_dtype`, for what is not registered with autocast; differentiable."""
    return x.to(linear_dtype(x))


def mixes_all(num_experts: int, top_k: int) -> bool:
    """Whether to compute all experts for all tokens: where each token goes to each expert anyway."""
    return top_k == num_experts


def has_grouped_kernel(slots: Tensor, weight: Tensor) -> bool:
    """Whether one kernel computes all experts from sizes that stay on the device.

    ``grouped_mm`` does so for bfloat16 on compute capabilities 9 and 10 (H100 to B300). Elsewhere it is a loop that copies
    the sizes to the host, no better than our own.
    """
    return (
        slots.is_cuda
        and linear_dtype(slots) == linear_dtype(weight) == torch.bfloat16
        and hasattr(F, "grouped_mm")
        and weight.shape[1] % 8 == weight.shape[2] % 8 == 0  # rows of whole 16 bytes
        and torch.version.hip is None
        and torch.cuda.get_device_capability(slots.device)[0] in (9, 10)
    )


def routes_in_kernels(tokens: Tensor, weight: Tensor, top_k: int, activation: nn.Module) -> bool:
    """Whether :mod:`.kernels` routes, multiplies and activates: one expert a token, GELU, where there is a grouped kernel.

    Not within ``torch.compile``, which does not see through it.
    """
    return (
        routed_gelu is not None
        and top_k == 1 < len(weight) <= 64
        and len(tokens) > 0
        and isinstance(activation, GELUActivation)
        and activation.act is F.gelu
        and has_grouped_kernel(tokens, weight)
        and not torch.compiler.is_compiling()
        and can_compile(tokens.device)
    )


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


def restore(results: Tensor, assignment: Assignment, real: Tensor | None, count: int) -> Tensor:
    """Put weighed results back in the batch's order: (count, D), zero at padding.

    Args:
        results: (T, D), what :func:`expert_linear` gave with ``weigh``, or what was computed from it row by row.
        assignment: the one it was given.
        real: (T,) int64, places of the tokens in the batch; None where all are real.
        count: places in the batch, padding included.
    """
    is_sorted = not assignment.mixed and assignment.top_k == 1
    if real is None:
        return _Sum.apply(results, assignment.rows, assignment.inverse, 1) if is_sorted else results
    return _Place.apply(results, real.index_select(0, assignment.rows) if is_sorted else real, count)


def pick(hidden: Tensor, real: Tensor) -> Tensor:
    """The rows ``real`` (T,), each at most once, of hidden (M, D)."""
    return _Pick.apply(hidden, real)


def expert_linear(x: Tensor, weight: Tensor, bias: Tensor, assignment: Assignment, *, weigh: bool) -> Tensor:
    """Apply experts, N Linear layers, to what :func:`gather` gave, or to what was computed from it row by row.

    Args:
        x: (S, in), sorted by expert; where mixed (T, in), or (N, T, in) with rows for each expert.
        weight: (N, out, in).
        bias: (N, out).
        assignment: which part of ``x`` is whose.
        weigh: whether to multiply by the assignment's weights and to sum over the experts of a token.

    Returns:
        With ``weigh`` one row a token, (T, out): at k = 1 still in sorted order, else in the tokens'. Without, all
        slots: (S, out), or (N, T, out) where mixed.
    """
    # What follows is not registered with autocast; these casts are differentiable.
    x, weight, bias = (cast(tensor) for tensor in (x, weight, bias))
    if assignment.mixed:
        if weigh:
            return _MixedLinear.apply(x, weight, bias, assignment.weights)
        return torch.baddbmm(bias.unsqueeze(1), x.expand(len(weight), -1, -1), weight.transpose(1, 2))
    scale = None
    if weigh:
        scale = _Gather.apply(assignment.weights.flatten(), assignment.order, assignment.inverse, 1)  # (S,)
    if has_grouped_kernel(x, weight):
        results = _GroupedLinear.apply(x, weight, bias, scale, assignment.counts, assignment.unit)
    else:
        results = _sliced_linear(x, weight, bias, scale, assignment)
    if weigh and assignment.top_k > 1:
        results = _Sum.apply(results, assignment.rows, assignment.inverse, assignment.top_k)
    return results


def scores(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` in at least float32: x (T, in), weight (N, in) to (T, N)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if x.dtype == dtype:
        return F.linear(x, weight.to(dtype))
    return _Scores.apply(x, weight, dtype)


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
    def backward(ctx, grad: Tensor) -> tuple:
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
    def backward(ctx, grad: Tensor) -> tuple:
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
    def backward(ctx, grad: Tensor) -> tuple:
        (places,) = ctx.saved_tensors
        return grad.new_zeros(ctx.count, *grad.shape[1:]).index_copy_(0, places, grad), None


class _Place(torch.autograd.Function):
    """Rows to their places in a batch of zeros."""

    @staticmethod
    def forward(ctx, rows: Tensor, places: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(places)
        return rows.new_zeros(count, *rows.shape[1:]).index_copy_(0, places, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple:
        (places,) = ctx.saved_tensors
        return grad.index_select(0, places), None, None


class _Scores(torch.autograd.Function):
    """Scores in a wider dtype than that of ``x``, of which no wide copy is kept for the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.to(dtype) @ weight.to(dtype).t()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight.to(grad.dtype)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad.t() @ x.to(grad.dtype)).to(weight.dtype)
        return grad_x, grad_weight, None


@torch.compiler.disable  # sizes are numbers here, and would be compiled in as constants
def _sliced_linear(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, assignment: Assignment) -> Tensor:
    return _SlicedLinear.apply(x, weight, bias, scale, assignment.sizes, assignment.unit)


def _parts(sizes: list[int]) -> Iterator[tuple[int, slice]]:
    """Number and slots of each expert that has any."""
    start = 0
    for expert, size in enumerate(sizes):
        if size:
            yield expert, slice(start, start + size)
        start += size


class _SlicedLinear(torch.autograd.Function):
    """One matrix product per expert, each into its part of one output: no parts are split, joined or accumulated."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, sizes: list[int], unit: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, scale)
        ctx.sizes, ctx.unit = sizes, unit
        out = x.new_empty(x.shape[0], weight.shape[1])
        for expert, part in _parts(sizes):
            if scale is None or unit:
                torch.addmm(bias[expert], x[part], weight[expert].t(), out=out[part])
            else:
                by = scale[part].unsqueeze(1).to(x.dtype)
                torch.mul(by, bias[expert], out=out[part])
                out[part].addmm_(x[part] * by, weight[expert].t())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple:
        x, weight, bias, scale = ctx.saved_tensors
        need_x, need_weight, need_bias, need_scale = ctx.needs_input_grad[:4]
        grad = grad.contiguous()
        grad_x = torch.empty_like(x) if need_x or need_scale else None
        grad_weight = torch.empty_like(weight) if need_weight else None
        grad_bias = torch.empty_like(bias) if need_bias else None
        grad_scale = torch.empty_like(scale) if need_scale else None
        for expert, size in enumerate(ctx.sizes):
            if size == 0:
                for gradient in (grad_weight, grad_bias):
                    if gradient is not None:
                        gradient[expert].zero_()
        for expert, part in _parts(ctx.sizes):
            g, inputs = grad[part], x[part]
            by = None if scale is None or ctx.unit else scale[part].unsqueeze(1).to(x.dtype)
            if grad_x is not None:
                torch.mm(g, weight[expert], out=grad_x[part])
                if need_scale:
                    dots = (grad_x[part] * inputs).sum(1, dtype=scale.dtype)
                    torch.add(dots, g @ bias[expert], out=grad_scale[part])
                if by is not None:
                    grad_x[part].mul_(by)
            if by is not None and (need_weight or need_bias):
                inputs = inputs * by
            if need_weight:
                torch.mm(g.t(), inputs, out=grad_weight[expert])
            if need_bias:
                grad_bias[expert] = g.sum(0) if by is None else (g.t() @ by).squeeze(1)
        return grad_x if need_x else None, grad_weight, grad_bias, grad_scale, None, None


class _GroupedLinear(torch.autograd.Function):
    """The same by ``grouped_mm``, which reads the parts' ends on the device."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, counts: Tensor, unit: bool
    ) -> Tensor:
        ends = counts.cumsum(0, dtype=torch.int32)
        # (S, N), the weight of each slot in the column of its expert: what brings in the biases, which grouped_mm does
        # not take, and their gradients, as one matrix product without a tensor of gathered biases.
        slots = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
        owner = ((slots < ends) & (slots >= ends - counts)).to(x.dtype)
        by = None
        if scale is not None and not unit:
            by = scale.unsqueeze(1).to(x.dtype)
            owner = owner * by
        ctx.save_for_backward(x, weight, bias, scale, ends, owner)
        ctx.unit = unit
        out = F.grouped_mm(x if by is None else x * by, weight.transpose(1, 2), offs=ends)
        return out.addmm_(owner, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple:
        x, weight, bias, scale, ends, owner = ctx.saved_tensors
        need_x, need_weight, need_bias, need_scale = ctx.needs_input_grad[:4]
        grad = grad.contiguous()  # grouped_mm refuses expanded ones
        by = None if scale is None or ctx.unit else scale.unsqueeze(1).to(x.dtype)
        grad_x = grad_weight = grad_bias = grad_scale = None
        if need_x or need_scale:
            grad_x = F.grouped_mm(grad, weight, offs=ends)
            if need_scale:
                of_bias = ((grad @ bias.t()) * (owner != 0)).sum(1, dtype=scale.dtype)
                grad_scale = (grad_x * x).sum(1, dtype=scale.dtype) + of_bias
            if by is not None:
                grad_x.mul_(by)
        if need_weight:
            grad_weight = F.grouped_mm(grad.t(), x if by is None else x * by, offs=ends)
        if need_bias:
            grad_bias = owner.t() @ grad
        return grad_x if need_x else None, grad_weight, grad_bias, grad_scale, None, None


class _MixedLinear(torch.autograd.Function):
    """All experts for all tokens, weighted and summed: the products add up in one output of the dense layer's size."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias, weights)
        by = weights.to(x.dtype)  # (T, N)
        out = x.new_zeros(by.shape[0], weight.shape[1])
        for expert, inputs in enumerate(x.expand(len(weight), -1, -1)):
            # Not by @ bias: products with so small an inner dimension are slow on CPUs.
            out.addcmul_(by[:, expert, None], bias[expert])
            out.addmm_(inputs * by[:, expert, None], weight[expert].t())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple:
        x, weight, bias, weights = ctx.saved_tensors
        need_x, need_weight, need_bias, need_weights = ctx.needs_input_grad
        grad, by, shared = grad.contiguous(), weights.to(x.dtype), x.ndim == 2
        grad_x = (torch.zeros_like(x) if shared else torch.empty_like(x)) if need_x else None
        grad_weight = torch.empty_like(weight) if need_weight else None
        grad_bias = by.t() @ grad if need_bias else None
        grad_weights = (grad @ bias.t()).to(weights.dtype) if need_weights else None
        for expert, inputs in enumerate(x.expand(len(weight), -1, -1)):
            if need_x or need_weights:
                through = grad @ weight[expert]  # (T, in)
                if need_weights:
                    grad_weights[:, expert] += (through * inputs).sum(1, dtype=weights.dtype)
                if need_x and shared:
                    grad_x.addcmul_(through, by[:, expert, None])
                elif need_x:
                    torch.mul(through, by[:, expert, None], out=grad_x[expert])
            if need_weight:
                torch.mm(grad.t(), inputs * by[:, expert, None], out=grad_weight[expert])
        return grad_x, grad_weight, grad_bias, grad_weights
