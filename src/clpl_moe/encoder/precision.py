"""The precision that an encoder computes in, and how its Linear layers compute on a CPU.

In float32 on some processors MKL, which torch takes by itself, is slower than oneDNN: this adds the bias within the product,
where MKL first copies it for every token, and it can keep the weights in the layout that it computes with; results differ in
the last bits. In bfloat16 torch takes oneDNN itself, but lays the weights out anew for every batch, and under autocast casts
them, too. ``torch.compile`` uses the same operators. Encoding 250 texts on an AMD EPYC took 9.06 s with oneDNN and 9.80 s
without, 8% less (medians of 6 runs in turns).
"""

from __future__ import annotations

import contextlib
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from clpl_moe.common.machine import cpu_field


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


def onednn_linear(model: nn.Module, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """A block in which ``model``, run in ``dtype`` without gradients, computes its Linear layers the faster way.

    The weights must not change within the block. From a layer's second call on the block holds a copy of its weights.
    """
    parameter = next(model.parameters())
    if parameter.device.type != "cpu" or not _has_operators():
        return contextlib.nullcontext()
    single = parameter.dtype == dtype == torch.float32 and _faster_than_mkl()
    half = dtype == torch.bfloat16 and fast_bfloat16(parameter.device)
    return _OneDNNLinear(dtype) if single or half else contextlib.nullcontext()


class _OneDNNLinear(TorchFunctionMode):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        self._weights: dict[int, Tensor] = {}  # id of a weight -> itself, then its copy in oneDNN's layout

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is F.linear and not kwargs and self._fits(*args[:2]):
            return self._linear(*args)
        return func(*args, **(kwargs or {}))

    def _fits(self, inputs: Tensor, weight: Tensor) -> bool:
        # A parameter lives as long as the model, so that nothing else can get its id.
        plain = type(inputs) is Tensor and type(weight) is nn.Parameter and weight.dim() == 2 and inputs.numel() > 0
        cast = torch.is_autocast_enabled("cpu")
        dtypes = {torch.get_autocast_dtype("cpu")} if cast else {inputs.dtype, weight.dtype}
        return plain and dtypes == {self._dtype} and torch.float64 not in (inputs.dtype, weight.dtype)

    def _linear(self, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        known = self._weights.get(id(weight))
        # A text or two is one batch: packing would take longer than it saves.
        if known is None:
            known = self._weights[id(weight)] = weight
        elif known is weight:
            rows = inputs.shape[:-1].numel()
            known = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(self._dtype), rows)
            self._weights[id(weight)] = known
        if known is weight:
            known = weight.to(self._dtype)
        bias = None if bias is None else bias.to(self._dtype)
        return torch.ops.mkldnn._linear_pointwise(inputs.to(self._dtype), known, bias, "none", [], "")


@cache
def _has_operators() -> bool:
    # The two are private, though torch.compile is built on them; a torch without them does without.
    operators = ("_linear_pointwise", "_reorder_linear_weight")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in operators)


@cache
def _faster_than_mkl() -> bool:
    return torch.backends.mkl.is_available() and cpu_field("vendor_id") == "AuthenticAMD"
