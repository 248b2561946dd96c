"""Experts: N Linear layers in one parameter, and the ways to compute them.

A weight multiplies the input of an expert and not its output, ``w · (W x + b) = W (w x) + w b``. Then the gradient of
the weight is ``(Wᵀ g) · x + g · b`` for the gradient ``g`` of the output: the backward pass has all of it anyway, so no
output is saved. Weights that are 1 in value (straight-through, k = 1) multiply nothing, and still get this gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .dispatch import Assignment, cast, gather_weights, sum_slots
from .kernel_choice import choose_kernel


class Experts(nn.Module):
    """N Linear layers in one parameter: weight (N, out, in), bias (N, out)."""

    def __init__(self, num_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features))

    @classmethod
    def from_linear(cls, linear: nn.Linear, num_experts: int) -> Experts:
        """Copies of ``linear``, in its dtype and on its device (sparse upcycling, arXiv:2212.05055)."""
        experts = cls(0, linear.in_features, linear.out_features)
        experts.weight = nn.Parameter(linear.weight.detach().expand(num_experts, -1, -1).clone())
        experts.bias = nn.Parameter(linear.bias.detach().expand(num_experts, -1).clone())
        return experts

    def merged(self, shares: Tensor | None = None) -> nn.Linear:
        """A Linear with the mean of the experts' weights, or with their sum weighted by ``shares`` (N,)."""
        _, out_features, in_features = self.weight.shape
        linear = nn.Linear(in_features, out_features, device=self.weight.device, dtype=self.weight.dtype)
        with torch.no_grad():
            for new, parts in ((linear.weight, self.weight), (linear.bias, self.bias)):
                new.copy_(parts.mean(0) if shares is None else torch.tensordot(shares.to(parts), parts, dims=1))
        return linear

    def extra_repr(self) -> str:
        experts, out_features, in_features = self.weight.shape
        return f"num_experts={experts}, in_features={in_features}, out_features={out_features}"

    def forward(self, x: Tensor, assignment: Assignment, weigh: bool = True) -> Tensor:
        """As :func:`expert_linear`."""
        return expert_linear(x, self.weight, self.bias, assignment, weigh=weigh)


def expert_linear(x: Tensor, weight: Tensor, bias: Tensor, assignment: Assignment, *, weigh: bool) -> Tensor:
    """Apply experts, weight (N, out, in) and bias (N, out), to what :func:`.dispatch.gather` gave or was computed from it.

    ``x`` is (S, in), sorted by expert; where mixed (T, in), or (N, T, in) with rows for each expert.

    Returns:
        With ``weigh``, results multiplied by the assignment's weights and summed over a token's experts, (T, out): at k = 1
        still in sorted order, else in the tokens'. Without, all slots: (S, out), or (N, T, out) where mixed.
    """
    if (expert := assignment.alone) is not None:
        return F.linear(x, *(p.mean(0) if expert == "mean" else p[expert] for p in (weight, bias)))
    # What follows is not registered with autocast; these casts are differentiable.
    x, weight, bias = cast(x), cast(weight), cast(bias)
    kernel = choose_kernel(x, weight, assignment.top_k)
    if kernel == "mixed":
        if weigh:
            return _MixedLinear.apply(x, weight, bias, assignment.weights)
        return torch.baddbmm(bias.unsqueeze(1), x.expand(len(weight), -1, -1), weight.transpose(1, 2))
    scale = gather_weights(assignment) if weigh else None  # (S,)
    if kernel == "grouped":
        results = _GroupedLinear.apply(x, weight, bias, scale, assignment.counts, assignment.unit)
    else:
        results = _sliced_linear(x, weight, bias, scale, assignment)
    return sum_slots(results, assignment) if weigh and assignment.top_k > 1 else results


@torch.compiler.disable  # sizes are numbers here, and would be compiled in as constants
def _sliced_linear(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, assignment: Assignment) -> Tensor:
    return _SlicedLinear.apply(x, weight, bias, scale, assignment.sizes, assignment.unit)


def _parts(sizes: list[int]) -> Iterator[tuple[int, slice]]:
    """Number and slots of each expert."""
    for expert, (size, end) in enumerate(zip(sizes, accumulate(sizes))):
        yield expert, slice(end - size, end)


class _SlicedLinear(torch.autograd.Function):
    """One matrix product per expert, each into its part of one output: no parts are split, joined or accumulated."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, sizes: list, unit: bool) -> Tensor:
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
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, scale = ctx.saved_tensors
        need_x, need_weight, need_bias, need_scale = ctx.needs_input_grad[:4]
        grad = grad.contiguous()
        grad_x = torch.empty_like(x) if need_x or need_scale else None
        grad_weight = torch.empty_like(weight) if need_weight else None
        grad_bias = torch.empty_like(bias) if need_bias else None
        grad_scale = torch.empty_like(scale) if need_scale else None
        for expert, part in _parts(ctx.sizes):
            g, inputs = grad[part], x[part]
            by = None if scale is None or ctx.unit else scale[part].unsqueeze(1).to(x.dtype)
            if grad_x is not None:
                torch.mm(g, weight[expert], out=grad_x[part])
                if grad_scale is not None:
                    dots = (grad_x[part] * inputs).sum(1, dtype=scale.dtype)
                    torch.add(dots, g @ bias[expert], out=grad_scale[part])
                if by is not None:
                    grad_x[part].mul_(by)
            if grad_weight is not None:
                torch.mm(g.t(), inputs if by is None else inputs * by, out=grad_weight[expert])
            if grad_bias is not None:
                grad_bias[expert] = g.sum(0) if by is None else (g.t() @ by).squeeze(1)
        return grad_x if need_x else None, grad_weight, grad_bias, grad_scale, None, None


class _GroupedLinear(torch.autograd.Function):
    """The same by ``grouped_mm``, which reads the parts' ends on the device."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, sizes: Tensor, unit: bool
    ) -> Tensor:
        ends = sizes.cumsum(0, dtype=torch.int32)
        # (S, N), the weight of each slot in the column of its expert: a product with it adds the biases, which grouped_mm
        # does not take.
        slots = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
        owner = ((slots < ends) & (slots >= ends - sizes)).to(x.dtype)
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
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
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
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
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
                if grad_weights is not None:
                    grad_weights[:, expert] += (through * inputs).sum(1, dtype=weights.dtype)
                if grad_x is not None and shared:
                    grad_x.addcmul_(through, by[:, expert, None])
                elif grad_x is not None:
                    torch.mul(through, by[:, expert, None], out=grad_x[expert])
            if grad_weight is not None:
                torch.mm(grad.t(), inputs * by[:, expert, None], out=grad_weight[expert])
        return grad_x, grad_weight, grad_bias, grad_weights
