"""Whether the kernels that are written in Triton can be used."""

from __future__ import annotations

import functools
import warnings

import torch
import triton
import triton.language as tl


@triton.jit
def _write_kernel(x):
    tl.store(x, 1)


@functools.cache
def can_compile(device: torch.device) -> bool:
    """Whether Triton compiles kernels for ``device``; where it should and cannot, a warning says why, once.

    It wants a C compiler and Python's headers when a kernel is first used. The kernels are for CUDA devices of compute
    capability 8.0 and above.
    """
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
