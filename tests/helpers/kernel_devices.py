"""Where tests of Triton kernels run: in its interpreter on a CPU, and compiled on a CUDA device."""

from __future__ import annotations

import os

import pytest

DEVICES = [
    pytest.param(
        "cpu", marks=pytest.mark.skipif(not os.environ.get("TRITON_INTERPRET"), reason="Triton compiles for a GPU here")
    ),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
