"""The end of an encoder's attention and feed-forward blocks on a CUDA device: sum with the residual and layer norm in one pass.

Under autocast to bfloat16 the sum is taken and normalised in float32, and the next Linear layers take it in bfloat16. Single
operations read and write the tokens four times for this, and more often in the backward pass. Here each value is read once
and written in both precisions at once. Results that the experts left in their own order are read from their places.

Sums over several blocks are written by block and added afterwards, so that results repeat exactly. Triton
comes with torch's CUDA builds; its interpreter runs all this on a CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_ROWS = 32  # of a block in the backward pass


@triton.jit
def _forward_kernel(
    x, residual, slots, weight, bias, wide, half, mean, scale, eps,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, HAS_SLOTS: tl.constexpr, HAS_HALF: tl.constexpr,
):  # fmt: skip
    """One token: its sum, normalised, in one or two precisions; the sum's mean and reciprocal standard deviation."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, COLUMNS)
    mask = d < WIDTH
    source = row
    if HAS_SLOTS:
        source = tl.load(slots + row)
    z = tl.load(x + source * WIDTH + d, mask=mask, other=0.0).to(tl.float32)
    z += tl.load(residual + row * WIDTH + d, mask=mask, other=0.0).to(tl.float32)
    middle = tl.sum(z, axis=0) / WIDTH
    centred = tl.where(mask, z - middle, 0.0)
    rate = 1 / tl.sqrt(tl.sum(centred * centred, axis=0) / WIDTH + eps)
    tl.store(mean + row, middle)
    tl.store(scale + row, rate)
    y = centred * rate * tl.load(weight + d, mask=mask, other=0.0).to(tl.float32)
    y += tl.load(bias + d, mask=mask, other=0.0).to(tl.float32)
    tl.store(wide + row * WIDTH + d, y, mask=mask)
    if HAS_HALF:
        tl.store(half + row * WIDTH + d, y, mask=mask)


@triton.jit
def _backward_kernel(
    grad_wide, grad_half, x, residual, slots, weight, mean, scale, grad_x, grad_residual, parts, rows,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    HAS_SLOTS: tl.constexpr, HAS_WIDE: tl.constexpr, HAS_HALF: tl.constexpr, HAS_PARTS: tl.constexpr,
):  # fmt: skip
    """Some tokens: the gradient of their sums, in the precision of each summand; the block's part of weight's and bias's."""
    block = tl.program_id(0)
    d = tl.arange(0, COLUMNS)
    mask = d < WIDTH
    w = tl.load(weight + d, mask=mask, other=0.0).to(tl.float32)
    weight_part = tl.zeros((COLUMNS,), tl.float32)
    bias_part = tl.zeros((COLUMNS,), tl.float32)
    for number in range(0, ROWS):
        row = (block * ROWS + number).to(tl.int64)
        here = d < tl.where(row < rows, WIDTH, 0)  # none beyond the last row
        known = tl.minimum(row, rows - 1)
        source = row
        if HAS_SLOTS:
            source = tl.load(slots + known)
        grad = tl.zeros((COLUMNS,), tl.float32)
        if HAS_WIDE:
            grad += tl.load(grad_wide + row * WIDTH + d, mask=here, other=0.0).to(tl.float32)
        if HAS_HALF:
            grad += tl.load(grad_half + row * WIDTH + d, mask=here, other=0.0).to(tl.float32)
        z = tl.load(x + source * WIDTH + d, mask=here, other=0.0).to(tl.float32)
        z += tl.load(residual + row * WIDTH + d, mask=here, other=0.0).to(tl.float32)
        rate = tl.load(scale + known)
        normal = tl.where(here, (z - tl.load(mean + known)) * rate, 0.0)
        if HAS_PARTS:
            weight_part += grad * normal
            bias_part += grad
        grad *= w
        grad -= tl.sum(grad, axis=0) / WIDTH + normal * (tl.sum(grad * normal, axis=0) / WIDTH)
        grad *= rate
        tl.store(grad_residual + row * WIDTH + d, grad, mask=here)
        tl.store(grad_x + source * WIDTH + d, grad, mask=here)
    if HAS_PARTS:
        place = block.to(tl.int64) * 2 * WIDTH + d
        tl.store(parts + place, weight_part, mask=mask)
        tl.store(parts + place + WIDTH, bias_part, mask=mask)


def add_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, slots: Tensor | None = None
) -> tuple[Tensor, ...]:
    """``layer_norm(x + residual)`` with weight (D,) and bias (D,), computed in float32; differentiable.

    ``x`` and ``residual`` are (T, D), of any float dtypes. With ``slots`` (T,) int64, a permutation, the row of token t is
    ``x[slots[t]]``. The result (T, D) comes in the dtype of ``residual``, and again in the dtype of ``x`` if that is another.
    """
    with torch.cuda.device_of(x):  # where Triton launches, whatever the current device is
        wide, half = _AddNorm.apply(x, residual, weight, bias, eps, slots)
    return (wide,) if half is None else (wide, half)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, slots: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        x, residual = x.contiguous(), residual.contiguous()
        rows, width = x.shape
        wide = torch.empty_like(residual)
        half = torch.empty_like(x) if x.dtype != residual.dtype else None
        mean, scale = x.new_empty(2, rows, dtype=torch.float32)
        sizes = {"WIDTH": width, "COLUMNS": triton.next_power_of_2(width), "HAS_SLOTS": slots is not None}
        _forward_kernel[(rows,)](
            x, residual, slots, weight, bias, wide, half, mean, scale, eps, **sizes, HAS_HALF=half is not None
        )
        ctx.save_for_backward(x, residual, weight, slots, mean, scale)
        ctx.sizes, ctx.bias_dtype = sizes, bias.dtype
        ctx.set_materialize_grads(False)
        return wide, half

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_wide: Tensor | None, grad_half: Tensor | None) -> tuple[Tensor | None, ...]:
        x, residual, weight, slots, mean, scale = ctx.saved_tensors
        rows, width = x.shape
        blocks = triton.cdiv(rows, _ROWS)
        grad_wide, grad_half = (None if grad is None else grad.contiguous() for grad in (grad_wide, grad_half))
        grad_x, grad_residual = torch.empty_like(x), torch.empty_like(residual)
        need_parts = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        parts = mean.new_empty(blocks, 2, width) if need_parts else None
        given = {"HAS_WIDE": grad_wide is not None, "HAS_HALF": grad_half is not None, "HAS_PARTS": need_parts}
        inputs, outputs = (x, residual, slots, weight, mean, scale), (grad_x, grad_residual, parts)
        _backward_kernel[(blocks,)](grad_wide, grad_half, *inputs, *outputs, rows, **ctx.sizes, ROWS=_ROWS, **given)
        grad_weight = grad_bias = None
        if parts is not None:
            grad_weight, grad_bias = parts.sum(0)
            grad_weight, grad_bias = grad_weight.to(weight.dtype), grad_bias.to(ctx.bias_dtype)
        return grad_x, grad_residual, grad_weight, grad_bias, None, None
