"""What decides the kernel: how a layer's experts are computed, by shape, dtype, device and router.

The first that fits:

=========== ================================================== ====================================================
kernel      where                                              how
=========== ================================================== ====================================================
``mixed``   k = N                                              nothing is sorted; all products add up in one output
``fused``   k = 1, GELU, a router that the kernels know, no    sorted, in kernels of our own around ``grouped_mm``
            ``torch.compile``, where the next row holds and    (:mod:`clpl_moe.moe.kernels`): fewer passes over the
            Triton compiles                                    tokens
``grouped`` bfloat16 on CUDA, compute capability 9 or 10       sorted, one ``grouped_mm``; nothing waits for the
                                                               device
``sliced``  elsewhere                                          sorted, one product per expert; on CUDA the experts'
                                                               numbers of tokens are read once a layer
=========== ================================================== ====================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUActivation

from .dispatch import linear_dtype

routed_gelu: Callable[..., tuple[Tensor, ...]] | None = None
_can_compile: Callable[[torch.device], bool] | None = None
try:
    # By their full names: they stay behind when this file travels with a model's weights.
    from clpl_moe.moe import kernels

    routed_gelu, _can_compile = kernels.routed_gelu, kernels.can_compile
except ImportError:  # no Triton, as in torch's CPU builds
    pass

Kernel = Literal["mixed", "fused", "grouped", "sliced"]


def choose_kernel(
    tokens: Tensor, weight: Tensor, top_k: int, *, router: nn.Module | None = None, activation: object = None
) -> Kernel:
    """How experts with ``weight`` (N, out, in) are computed for ``tokens`` (..., in), sorted or not.

    ``"fused"`` only before tokens are routed, where ``router`` and ``activation`` say what stands around the experts.
    """
    if top_k == len(weight):
        return "mixed"
    if not has_grouped_kernel(tokens, weight):
        return "sliced"
    fuses = (
        top_k == 1
        and getattr(router, "fused_as", None) is not None
        and is_exact_gelu(activation)
        and len(weight) <= 64
        and len(tokens) > 0
        and not torch.compiler.is_compiling()  # which does not see through the kernels
        and triton_compiles(tokens.device)
    )
    return "fused" if fuses else "grouped"


def has_grouped_kernel(tokens: Tensor, weight: Tensor) -> bool:
    """Whether ``grouped_mm`` is one kernel, which reads the experts' sizes on the device.

    Elsewhere than in bfloat16 on compute capabilities 9 and 10 (H100 to B300) it is a loop that copies them to the host.
    """
    return (
        tokens.is_cuda
        and linear_dtype(tokens) == linear_dtype(weight) == torch.bfloat16
        and hasattr(F, "grouped_mm")
        and weight.shape[1] % 8 == weight.shape[2] % 8 == 0  # rows of whole 16 bytes
        and torch.version.hip is None
        and torch.cuda.get_device_capability(tokens.device)[0] in (9, 10)
    )


def is_exact_gelu(activation: object) -> bool:
    """Whether an activation is the one that the fused kernels apply."""
    return isinstance(activation, GELUActivation) and activation.act is F.gelu


def triton_compiles(device: torch.device) -> bool:
    """Whether Triton is installed and compiles kernels for ``device``."""
    return _can_compile is not None and _can_compile(device)
