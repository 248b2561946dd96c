import contextlib
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from clpl_moe.moe import triton_support

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from clpl_moe import MoEConfig, inject_moe
from clpl_moe.encoder.packing import PackedTexts, add_norm, embed_packed
from clpl_moe.moe.kernel_choice import routed_gelu
from helpers.tiny import make_encoder
assert add_norm is None and routed_gelu is None
encoder = inject_moe(make_encoder(), MoEConfig(2, 1))
with torch.autocast("cpu", torch.bfloat16):
    print(embed_packed(encoder, PackedTexts.from_sequences([[5, 6], [7]]), pooling="cls").shape)
"""


@pytest.fixture(autouse=True)
def forget():
    triton_support.can_compile.cache_clear()
    yield
    triton_support.can_compile.cache_clear()


def pretend_gpu(monkeypatch, capability=(9, 0)):
    """A device of the type CUDA whose tensors are on the CPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, dtype, device: empty(*size, dtype=dtype))
    return torch.device("cuda")


def test_not_for_a_cpu():
    assert not triton_support.can_compile(torch.device("cpu"))


def test_not_for_old_devices(monkeypatch):
    assert not triton_support.can_compile(pretend_gpu(monkeypatch, (7, 5)))


def test_says_once_why_not(monkeypatch):
    class Kernel:
        def __getitem__(self, grid):
            raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(triton_support, "_write_kernel", Kernel())
    device = pretend_gpu(monkeypatch)
    with pytest.warns(
        UserWarning, match=r"RuntimeError: Failed to find C compiler\.\).*apt-get install gcc python3-dev"
    ):
        assert not triton_support.can_compile(device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not triton_support.can_compile(device)


def test_where_a_kernel_runs(monkeypatch):
    calls = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda x: calls.append(x)

    monkeypatch.setattr(triton_support, "_write_kernel", Kernel())
    assert triton_support.can_compile(pretend_gpu(monkeypatch))
    assert len(calls) == 1


@pytest.mark.gpu
def test_on_a_gpu():
    assert triton_support.can_compile(torch.device("cuda"))


def test_all_works_without_triton():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "[2, 32]" in done.stdout
