"""Linear layers of one input, as of queries, keys and values: its gradients through them add up within the matrix products.

Autograd computes one through each layer and adds them afterwards, which reads and writes the tokens four times more. On a GPU,
where that counts beside such fast products, it is a hundredth of a training step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from clpl_moe.moe.dispatch import cast

_DEVICES = ("cuda",)


def joint_linear(linears: Sequence[nn.Module], x: Tensor) -> tuple[Tensor, ...]:
    """``linear(x)`` for each of ``linears``; what is not exactly a Linear layer, or has hooks, is called as always.

    Args:
        linears: the layers, each from D to any width.
        x: (..., D), of any float dtype.

    Returns:
        (..., width) for each, in the dtype that autocast gives Linear layers.
    """
    joins = x.device.type in _DEVICES and x.requires_grad and torch.is_grad_enabled()
    if not joins or torch.compiler.is_compiling() or not all(map(_is_plain, linears)):
        return tuple(linear(x) for linear in linears)
    parameters = (cast(parameter) for linear in linears for parameter in (linear.weight, linear.bias))
    return _JointLinear.apply(cast(x), *parameters)


def _is_plain(linear: nn.Module) -> bool:
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    return type(linear) is nn.Linear and linear.bias is not None and not any(hooks)


class _JointLinear(torch.autograd.Function):
    """x (..., D); then weight (width, D) and bias (width,) of each layer, all of one dtype."""

    @staticmethod
    def forward(ctx, x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        weights, biases = parameters[::2], parameters[1::2]
        # Where weights are frozen, nothing keeps their input.
        ctx.save_for_backward(x if any(ctx.needs_input_grad[1::2]) else None, *weights)
        return tuple(F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        shape = (*grads[0].shape[:-1], weights[0].shape[1])
        flat = [grad.flatten(0, -2) for grad in grads]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = flat[0] @ weights[0]
            for grad, weight in zip(flat[1:], weights[1:], strict=True):
                grad_x.addmm_(grad, weight)
            grad_x = grad_x.view(shape)
        of_parameters = []
        for grad, need_weight, need_bias in zip(
            flat, ctx.needs_input_grad[1::2], ctx.needs_input_grad[2::2], strict=True
        ):
            of_parameters.append(grad.t() @ x.flatten(0, -2) if need_weight else None)
            of_parameters.append(grad.sum(0) if need_bias else None)
        return grad_x, *of_parameters
