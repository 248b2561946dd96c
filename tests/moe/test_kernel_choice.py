"""What decides the kernel, on a device that is pretended to have the grouped one."""

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from clpl_moe.moe import kernel_choice
from clpl_moe.moe.kernel_choice import choose_kernel
from clpl_moe.moe.router import SoftmaxTopK, StraightThrough, TopKSoftmax
from helpers.tiny import make_moe


class Own(StraightThrough):
    """Promises nothing."""


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(kernel_choice, "has_grouped_kernel", lambda tokens, weight: True)
    monkeypatch.setattr(kernel_choice, "triton_compiles", lambda device: True)


def choose(num_experts=2, top_k=1, router=StraightThrough, activation="gelu", tokens=5):
    around = {} if router is None else {"router": router(16, num_experts, top_k), "activation": ACT2FN[activation]}
    return choose_kernel(torch.randn(tokens, 16), torch.randn(num_experts, 24, 16), top_k, **around)


@pytest.mark.parametrize(
    ("options", "kernel"),
    [
        ({}, "fused"),
        ({"router": TopKSoftmax}, "fused"),
        ({"num_experts": 64}, "fused"),
        ({"router": SoftmaxTopK}, "grouped"),
        ({"router": Own}, "grouped"),
        ({"router": None}, "grouped"),  # sorted tokens
        ({"activation": "gelu_new"}, "grouped"),
        ({"activation": "relu"}, "grouped"),
        ({"num_experts": 65}, "grouped"),
        ({"num_experts": 3, "top_k": 2}, "grouped"),
        ({"tokens": 0}, "grouped"),
        ({"top_k": 2}, "mixed"),
        ({"num_experts": 1}, "mixed"),
    ],
)
def test_with_a_grouped_kernel(fast, options, kernel):
    assert choose(**options) == kernel


def test_without_triton(fast, monkeypatch):
    monkeypatch.setattr(kernel_choice, "triton_compiles", lambda device: False)
    assert choose() == "grouped"


def test_within_torch_compile(fast, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert choose() == "grouped"


@pytest.mark.parametrize(("options", "kernel"), [({}, "sliced"), ({"top_k": 2}, "mixed")])
def test_on_a_cpu(options, kernel):
    assert choose(**options) == kernel


def test_an_adapter_around_experts_or_router_is_called(fast):
    class Around(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.inner = module
            self.calls = 0

        def forward(self, *args, **kwargs):
            self.calls += 1
            return self.inner(*args, **kwargs)

    for name in ("router", "dense"):
        half = make_moe().encoder.layer[0].intermediate
        around = Around(getattr(half, name))
        setattr(half, name, around)
        assert not half._fuses(torch.randn(3, 32))
