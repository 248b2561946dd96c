"""The router and the experts of a layer's first half on a CUDA device, in bfloat16, in as few passes as it takes.

1. One kernel scores the tokens, picks their experts and counts them by blocks of tokens.
2. A second one knows from the running sum of these counts where each token goes, and takes it there, cast on the way.
3. ``grouped_mm`` multiplies, and a third kernel adds the bias and applies GELU.
4. The backward pass of the third leaves the gradients of the biases and of the tokens' weights as by-products.
5. A last kernel takes the tokens' gradients back and adds those that come through the router, whose own it leaves, too.

Sums that several blocks contribute to are written by block and summed afterwards, always in the same order, so that
results repeat exactly. Triton comes with torch's CUDA builds; its interpreter runs all this on a CPU.
"""

from __future__ import annotations

import functools
import warnings

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

# Sizes that measured best on an H200. Kernels over tokens take so many tokens and columns at once, or copy so many columns.
TOKENS, COLUMNS, COPIED = tl.constexpr(64), tl.constexpr(64), tl.constexpr(512)
# Kernels over activations take so many slots and features at once; in the backward pass, sums are over so many slots.
TILE, FEATURES, SLOTS = tl.constexpr(4), tl.constexpr(512), tl.constexpr(64)
_WARPS = 2


@triton.jit
def _write_kernel(x):
    tl.store(x, 1)


@functools.cache
def can_compile(device: torch.device) -> bool:
    """Whether Triton compiles kernels for ``device``, of compute capability 8.0 or above; where not, a warning says why."""
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        with torch.cuda.device(device):
            _write_kernel[(1,)](torch.empty(1, dtype=torch.int32, device=device))
    except Exception as error:  # whatever it is, all else works without
        warnings.warn(
            "Triton cannot compile kernels here, so that training and encoding are slower than they could be"
            f" ({type(error).__name__}: {error}). It needs a C compiler and Python's headers: on Debian and Ubuntu,"
            " apt-get install gcc python3-dev",
            stacklevel=2,
        )
        return False
    return True


@triton.jit
def _route_kernel(x, weight, logits, experts, counts, tokens, num_experts, WIDTH: tl.constexpr, EXPERTS: tl.constexpr):
    """Logits and choice of a block's tokens; how many chose each expert."""
    block = tl.program_id(0)
    t = block * TOKENS + tl.arange(0, TOKENS)
    e = tl.arange(0, EXPERTS)
    rows = t.to(tl.int64)[:, None] * WIDTH
    scores = tl.zeros((TOKENS, EXPERTS), tl.float32)
    for start in range(0, WIDTH, COLUMNS):
        d = start + tl.arange(0, COLUMNS)
        values = tl.load(x + rows + d[None, :], mask=(t < tokens)[:, None] & (d < WIDTH)[None, :], other=0.0)
        known = (e < num_experts)[None, :] & (d < WIDTH)[:, None]
        row = tl.load(weight + e[None, :] * WIDTH + d[:, None], mask=known, other=0.0)
        scores += tl.dot(values.to(tl.float32), row.to(tl.float32), input_precision="tf32x3")
    real = (t < tokens)[:, None] & (e < num_experts)[None, :]
    tl.store(logits + t[:, None] * num_experts + e[None, :], scores, mask=real)
    # At most the last expert, so that NaN in the input does not become a place outside of everything.
    choice = tl.argmax(tl.where((e < num_experts)[None, :], scores, float("-inf")), axis=1)
    choice = tl.minimum(choice, num_experts - 1)
    tl.store(experts + t, choice, mask=t < tokens)
    chosen = (choice[:, None] == e[None, :]) & (t < tokens)[:, None]
    tl.store(counts + e * tl.num_programs(0) + block, tl.sum(chosen.to(tl.int32), axis=0), mask=e < num_experts)


@triton.jit
def _sort_kernel(
    x,
    experts,
    counts,
    ends,
    slots,
    rows,
    owners,
    x_sorted,
    tokens,
    num_experts,
    WIDTH: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Takes a block's tokens to their slots: those of one expert side by side, in the order of tokens."""
    block = tl.program_id(0)
    t = block * TOKENS + tl.arange(0, TOKENS)
    e = tl.arange(0, EXPERTS)
    choice = tl.load(experts + t, mask=t < tokens, other=-1)
    chosen = (choice[:, None] == e[None, :]).to(tl.int32)
    place = e * tl.num_programs(0) + block
    first = tl.load(ends + place, mask=e < num_experts, other=0)
    first -= tl.load(counts + place, mask=e < num_experts, other=0)
    slot = tl.sum(chosen * (first[None, :] + tl.cumsum(chosen, axis=0) - chosen), axis=1)
    tl.store(slots + t, slot, mask=t < tokens)
    tl.store(rows + slot, t, mask=t < tokens)
    tl.store(owners + slot, choice, mask=t < tokens)
    source, target = t.to(tl.int64)[:, None] * WIDTH, slot.to(tl.int64)[:, None] * WIDTH
    for start in range(0, WIDTH, COPIED):
        d = start + tl.arange(0, COPIED)
        mask = (t < tokens)[:, None] & (d < WIDTH)[None, :]
        tl.store(x_sorted + target + d[None, :], tl.load(x + source + d[None, :], mask=mask), mask=mask)


@triton.jit
def _place(CHUNKS: tl.constexpr):
    """This program's block of slots and chunk of their features; programs side by side do chunks side by side."""
    program = tl.program_id(0)
    return program // CHUNKS, program % CHUNKS


@triton.jit
def _normal(z):
    """The standard normal distribution's density at z, and its share below z, which GELU multiplies z with.

    By Abramowitz and Stegun's formula 7.1.26, error at most 1.5e-7, whose exponential is also the density's.
    """
    power = tl.exp(-0.5 * z * z)
    root = tl.rsqrt(1 + 0.23164188 * tl.abs(z))  # 0.3275911 / sqrt(2)
    t = root * root  # cheaper than a division
    tail = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    above = 0.5 * tail * power
    return 0.3989422804014327 * power, tl.where(z < 0, above, 1 - above)


@triton.jit
def _add_bias(z, bias, shared, same, owners, s, slots, f, WIDTH: tl.constexpr):
    """Adds the ``shared`` bias (FEATURES,) to products, or where it is not the ``same`` in all slots, that of each slot's expert."""
    if same:
        z += shared[None, :]
    else:  # in N - 1 blocks at most
        owner = tl.load(owners + s, mask=s < slots, other=0)
        real = (s < slots)[:, None] & (f < WIDTH)[None, :]
        z += tl.load(bias + owner[:, None] * WIDTH + f[None, :], mask=real, other=0.0).to(tl.float32)
    return z


@triton.jit
def _owners_of(block, owners, slots, COUNT: tl.constexpr):
    """The experts of a block's first and last slot; those between are between."""
    return tl.load(owners + block * COUNT), tl.load(owners + tl.minimum(block * COUNT + COUNT, slots) - 1)


@triton.jit
def _gelu_kernel(before, bias, owners, after, slots, WIDTH: tl.constexpr):
    """GELU of products plus the bias of each slot's expert."""
    block, chunk = _place(tl.cdiv(WIDTH, FEATURES))
    f = chunk * FEATURES + tl.arange(0, FEATURES)
    start = block * TILE
    offset, s = start.to(tl.int64) * WIDTH, start + tl.arange(0, TILE)
    place = tl.arange(0, TILE)[:, None] * WIDTH + f[None, :]
    real = (s < slots)[:, None] & (f < WIDTH)[None, :]
    z = tl.load(before + offset + place, mask=real, other=0.0).to(tl.float32)
    first, last = _owners_of(block, owners, slots, TILE)
    shared = tl.load(bias + first * WIDTH + f, mask=f < WIDTH, other=0.0).to(tl.float32)
    z = _add_bias(z, bias, shared, first == last, owners, s, slots, f, WIDTH)
    _, share = _normal(z)
    tl.store(after + offset + place, z * share, mask=real)


@triton.jit
def _gelu_backward_kernel(grad_after, before, bias, owners, grad_before, dots, bias_parts, slots, WIDTH: tl.constexpr):
    """Gradient of GELU's input; its product with each slot's; its sum over the slots of each expert in the block.

    The sum of block b for expert e is row b + e of ``bias_parts``: owners ascend, so that no two sums have the same row.
    """
    block, chunk = _place(tl.cdiv(WIDTH, FEATURES))
    f = chunk * FEATURES + tl.arange(0, FEATURES)
    place = tl.arange(0, TILE)[:, None] * WIDTH + f[None, :]
    expert, last = _owners_of(block, owners, slots, SLOTS)
    same = expert == last
    shared = tl.load(bias + expert * WIDTH + f, mask=f < WIDTH, other=0.0).to(tl.float32)
    total = tl.zeros((TILE, FEATURES), tl.float32)
    # In stages, so that the next tiles are on their way while one is computed; a quarter slower without.
    for number in tl.range(SLOTS // TILE, num_stages=3):
        start = block * SLOTS + number * TILE
        offset, s = start.to(tl.int64) * WIDTH, start + tl.arange(0, TILE)
        real = (s < slots)[:, None] & (f < WIDTH)[None, :]
        z = tl.load(before + offset + place, mask=real, other=0.0).to(tl.float32)
        grad = tl.load(grad_after + offset + place, mask=real, other=0.0).to(tl.float32)
        z = _add_bias(z, bias, shared, same, owners, s, slots, f, WIDTH)
        density, share = _normal(z)
        grad *= share + z * density
        tl.store(grad_before + offset + place, grad, mask=real)
        tl.store(dots + chunk * slots + s, tl.sum(grad * z, axis=1), mask=s < slots)
        total += grad
    if same:
        tl.store(bias_parts + (block + expert).to(tl.int64) * WIDTH + f, tl.sum(total, axis=0), mask=f < WIDTH)
    else:
        tl.debug_barrier()  # what other threads of the block have written is read
        while expert <= last:
            total = tl.zeros((TILE, FEATURES), tl.float32)
            for number in range(SLOTS // TILE):
                start = block * SLOTS + number * TILE
                s = start + tl.arange(0, TILE)
                own = tl.load(owners + s, mask=s < slots, other=-1) == expert
                mask = own[:, None] & (f < WIDTH)[None, :]
                total += tl.load(grad_before + start.to(tl.int64) * WIDTH + place, mask=mask, other=0.0).to(tl.float32)
            tl.store(bias_parts + (block + expert).to(tl.int64) * WIDTH + f, tl.sum(total, axis=0), mask=f < WIDTH)
            expert += 1


@triton.jit
def _bias_kernel(bias_parts, ends, grad_bias, WIDTH: tl.constexpr, BLOCKS: tl.constexpr, COUNT: tl.constexpr):
    """Sums one expert's rows of ``bias_parts``: so many features, so many rows at once."""
    expert = tl.program_id(0)
    f = tl.program_id(1) * COUNT + tl.arange(0, COUNT)
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    total = tl.zeros((BLOCKS, COUNT), tl.float32)
    block = begin // SLOTS
    stop = tl.where(end > begin, (end - 1) // SLOTS + 1, block)
    while block < stop:
        b = block + tl.arange(0, BLOCKS)
        mask = (b < stop)[:, None] & (f < WIDTH)[None, :]
        total += tl.load(bias_parts + (b + expert).to(tl.int64)[:, None] * WIDTH + f[None, :], mask=mask, other=0.0)
        block += BLOCKS
    tl.store(grad_bias + expert * WIDTH + f, tl.sum(total, axis=0), mask=f < WIDTH)


@triton.jit
def _route_backward_kernel(
    grad_sorted,
    x_sorted,
    logits,
    experts,
    slots,
    dots,
    grad_logits,
    weight,
    grad_x,
    weight_parts,
    tokens,
    num_experts,
    WIDTH: tl.constexpr,
    EXPERTS: tl.constexpr,
    LEARNS: tl.constexpr,
    DOTS: tl.constexpr,
):
    """Gradient of a block's tokens, through their experts and through the router, and the block's part of the router's."""
    block = tl.program_id(0)
    t = block * TOKENS + tl.arange(0, TOKENS)
    e = tl.arange(0, EXPERTS)
    real = (t < tokens)[:, None] & (e < num_experts)[None, :]
    slot = tl.load(slots + t, mask=t < tokens, other=0)
    source, target = slot.to(tl.int64)[:, None] * WIDTH, t.to(tl.int64)[:, None] * WIDTH
    scores_grad = tl.zeros((TOKENS, EXPERTS), tl.float32)
    if LEARNS:
        # The weight p / p, 1 in value, has the gradient of log p: 1 for the choice, less the probabilities.
        scores = tl.load(logits + t[:, None] * num_experts + e[None, :], mask=real, other=float("-inf"))
        scores = tl.where((t < tokens)[:, None], scores, 0.0)
        scores = tl.exp(scores - tl.max(scores, axis=1)[:, None])
        probabilities = scores / tl.sum(scores, axis=1)[:, None]
        choice = tl.load(experts + t, mask=t < tokens, other=0)
        chosen = (choice[:, None] == e[None, :]).to(tl.float32)
        weight_grad = tl.zeros((TOKENS,), tl.float32)
        for part in range(DOTS):
            weight_grad += tl.load(dots + part * tokens + slot, mask=t < tokens, other=0.0)
        scores_grad += weight_grad[:, None] * (chosen - probabilities)
    if grad_logits is not None:
        scores_grad += tl.load(grad_logits + t[:, None] * num_experts + e[None, :], mask=real, other=0.0)
    scores_grad = tl.where(real, scores_grad, 0.0)
    for start in range(0, WIDTH, COLUMNS):
        d = start + tl.arange(0, COLUMNS)
        mask = (t < tokens)[:, None] & (d < WIDTH)[None, :]
        grad = tl.load(grad_sorted + source + d[None, :], mask=mask, other=0.0).to(tl.float32)
        if LEARNS or grad_logits is not None:
            # In tf32, which is more than gradients in bfloat16 come with.
            known = (e < num_experts)[:, None] & (d < WIDTH)[None, :]
            row = tl.load(weight + e[:, None] * WIDTH + d[None, :], mask=known, other=0.0).to(tl.float32)
            grad += tl.dot(scores_grad, row, input_precision="tf32")
            value = tl.load(x_sorted + source + d[None, :], mask=mask, other=0.0).to(tl.float32)
            weight_part = tl.dot(tl.trans(scores_grad), value, input_precision="tf32")
            place = (block * num_experts + e).to(tl.int64)[:, None] * WIDTH + d[None, :]
            tl.store(weight_parts + place, weight_part, mask=known)
        tl.store(grad_x + target + d[None, :], grad, mask=mask)


def routed_gelu(x: Tensor, router_weight: Tensor, weight: Tensor, bias: Tensor, *, learns: bool) -> tuple[Tensor, ...]:
    """Activations of the one expert of each token, ``gelu(W x + b)``, sorted by expert; differentiable.

    Takes x (T, in), T at least 1, and the router's weight (N, in) in any float dtype; the experts' weight (N, out, in) and
    bias (N, out) in bfloat16; and whether a token's weight, 1 in value, has the gradient of its probability.

    Returns:
        activations (T, out) in bfloat16, sorted by expert; the router's logits (T, N) in float32, differentiable; and
        without gradients: ``rows`` (T,) int64, the token in each slot; ``slots`` (T,) int64, the slot of each token;
        ``counts`` (N,) int64, tokens of each expert.
    """
    with torch.cuda.device_of(x):  # where Triton launches, whatever the current device is
        return _RoutedGelu.apply(x, router_weight, weight, bias, learns)


class _RoutedGelu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, router_weight: Tensor, weight: Tensor, bias: Tensor, learns: bool
    ) -> tuple[Tensor, ...]:
        x, router_weight = x.contiguous(), router_weight.contiguous()
        tokens, width = x.shape
        num_experts, features, _ = weight.shape
        blocks = triton.cdiv(tokens, TOKENS.value)
        sizes = tokens, num_experts, width, _padded(num_experts)
        logits = x.new_empty(tokens, num_experts, dtype=torch.float32)
        experts = x.new_empty(tokens, dtype=torch.int32)
        counts = x.new_empty(num_experts, blocks, dtype=torch.int32)
        _route_kernel[(blocks,)](x, router_weight, logits, experts, counts, *sizes)

        ends = counts.flatten().cumsum(0, dtype=torch.int32)  # of each expert's part of each block
        slots, rows = (x.new_empty(tokens, dtype=torch.int64) for _ in range(2))
        owners = torch.empty_like(experts)
        x_sorted = x.new_empty(tokens, width, dtype=weight.dtype)
        _sort_kernel[(blocks,)](x, experts, counts, ends, slots, rows, owners, x_sorted, *sizes, num_warps=8)

        ends = ends.view(num_experts, blocks)[:, -1].contiguous()
        before = F.grouped_mm(x_sorted, weight.transpose(1, 2), offs=ends)
        after = torch.empty_like(before)
        grid = (triton.cdiv(tokens, TILE.value) * triton.cdiv(features, FEATURES.value),)
        _gelu_kernel[grid](before, bias, owners, after, tokens, features, num_warps=_WARPS)
        ctx.save_for_backward(x_sorted, router_weight, weight, bias, logits, experts, slots, owners, ends, before)
        ctx.learns, ctx.dtype = learns, x.dtype
        counts = counts.sum(1)
        ctx.mark_non_differentiable(rows, slots, counts)
        ctx.set_materialize_grads(False)
        return after, logits, rows, slots, counts

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor | None, grad_logits: Tensor | None, *_) -> tuple[Tensor | None, ...]:
        x_sorted, router_weight, weight, bias, logits, experts, slots, owners, ends, before = ctx.saved_tensors
        tokens, width = x_sorted.shape
        num_experts, features, _ = weight.shape
        grad = torch.zeros_like(before) if grad is None else grad.contiguous()
        blocks, chunks = triton.cdiv(tokens, SLOTS.value), triton.cdiv(features, FEATURES.value)
        grad_before = torch.empty_like(before)
        # The gradient of a token's weight, which multiplies the input of GELU, is that input's gradient times it.
        dots = logits.new_empty(chunks, tokens)
        bias_parts = logits.new_empty(blocks + num_experts - 1, features)
        arguments = grad, before, bias, owners, grad_before, dots, bias_parts, tokens, features
        _gelu_backward_kernel[(blocks * chunks,)](*arguments, num_warps=_WARPS)
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[2]:
            grad_weight = F.grouped_mm(grad_before.t(), x_sorted, offs=ends)
        if ctx.needs_input_grad[3]:
            grad_bias = torch.empty_like(bias)
            grid = num_experts, triton.cdiv(features, 32)
            _bias_kernel[grid](bias_parts, ends, grad_bias, features, 64, 32, num_warps=8)

        grad_sorted = F.grouped_mm(grad_before, weight, offs=ends)
        blocks = triton.cdiv(tokens, TOKENS.value)
        grad_x = x_sorted.new_empty(tokens, width, dtype=ctx.dtype)
        weight_parts = logits.new_empty(blocks, num_experts, width)
        routed = ctx.learns or grad_logits is not None
        grad_logits = None if grad_logits is None else grad_logits.contiguous()
        reads = grad_sorted, x_sorted, logits, experts, slots, dots, grad_logits, router_weight
        sizes = tokens, num_experts, width, _padded(num_experts)
        _route_backward_kernel[(blocks,)](
            *reads, grad_x, weight_parts, *sizes, LEARNS=ctx.learns, DOTS=chunks, num_stages=2
        )
        grad_router = weight_parts.sum(0).to(router_weight.dtype) if routed else None
        return grad_x, grad_router, grad_weight, grad_bias, None


def _padded(num_experts: int) -> int:
    """Experts in a kernel's tiles: the matrix units take 16 or more."""
    return max(16, triton.next_power_of_2(num_experts))
