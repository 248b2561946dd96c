"""The precision that an encoder computes in."""

from __future__ import annotations

import torch
from torch import nn


def compute_dtype(model: nn.Module, dtype: torch.dtype | None = None) -> torch.dtype:
    """The precision that a model runs in: its weights', or if they are float32, ``dtype`` (None: the device's fastest)."""
    parameter = next(model.parameters())
    if parameter.dtype != torch.float32:
        return parameter.dtype
    return dtype or (torch.bfloat16 if fast_bfloat16(parameter.device) else torch.float32)


def autocast(model: nn.Module, dtype: torch.dtype) -> torch.autocast:
    """The context in which a model runs in ``dtype``, as :func:`compute_dtype` gives it."""
    parameter = next(model.parameters())
    half = dtype != torch.float32 and parameter.dtype == torch.float32
    return torch.autocast(parameter.device.type, dtype if half else None, enabled=half)


def fast_bfloat16(device: torch.device) -> bool:
    """Whether a device computes matrix products faster in bfloat16 than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        features = torch.cpu.get_capabilities()
        return bool(features.get("amx_bf16") or features.get("avx512_bf16"))
    return False
