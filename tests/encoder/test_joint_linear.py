import contextlib

import pytest
import torch
from torch import nn

from clpl_moe.encoder import joint_linear as module
from clpl_moe.encoder.joint_linear import joint_linear
from clpl_moe.encoder.packing import PackedTexts, embed_packed
from helpers.calls import Calls
from helpers.tiny import make_encoder

ADDMM = torch.ops.aten.addmm_.default
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    monkeypatch.setattr(module, "_DEVICES", ("cpu", "cuda"))


def make(device="cpu", dtype=torch.float32):
    torch.manual_seed(0)
    linears = [nn.Linear(8, width).to(device, dtype) for width in (6, 10, 6)]
    return linears, torch.randn(1, 5, 8, device=device, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("frozen", [(), (0,), (1, 2), (0, 1, 2)])
def test_gradients(frozen):
    linears, x = make(dtype=torch.float64)
    for number in frozen:
        linears[number].requires_grad_(False)
    parameters = [p for linear in linears for p in linear.parameters()]

    def call(x, *parameters):
        return module._JointLinear.apply(x, *parameters)

    assert torch.autograd.gradcheck(call, (x, *parameters))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_as_one_by_one(device, dtype):
    linears, x = make(device=device)
    parameters = [p for linear in linears for p in linear.parameters()]
    results = []
    for call in (joint_linear, lambda linears, x: tuple(linear(x) for linear in linears)):
        with torch.autocast(device, dtype) if dtype else contextlib.nullcontext():
            outputs = call(linears, x)
        direction = torch.ones(5, 22, device=device).cumsum(1)
        total = (torch.cat([output.squeeze(0) for output in outputs], 1) * direction).sum()
        results.append((outputs, torch.autograd.grad(total, [x, *parameters])))
    (outputs, gradients), (expected, wanted) = results
    for output, one in zip(outputs, expected, strict=True):
        assert output.dtype == (dtype or torch.float32)
        assert torch.equal(output, one)
    for gradient, want in zip(gradients, wanted, strict=True):
        assert gradient.dtype == want.dtype
        torch.testing.assert_close(gradient, want, rtol=0.02 if dtype else 1e-5, atol=0.02 * bool(dtype))


def test_nothing_is_added_afterwards():
    linears, x = make()
    total = sum(output.sum() for output in joint_linear(linears, x))
    with Calls() as calls:
        torch.autograd.grad(total, x)
    assert calls.counts[ADDMM] == 2
    assert not {"add", "add_"} & {function.overloadpacket.__name__ for function in calls.counts}


def test_frozen_layers_do_not_keep_their_input():
    linears, x = make()
    kept = []
    for frozen in (False, True):
        saved = []
        for linear in linears:
            linear.requires_grad_(not frozen)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t.data_ptr()) or t, lambda t: t
        ):
            joint_linear(linears, x)
        kept.append(x.data_ptr() in saved)
    assert kept == [True, False]


@pytest.mark.parametrize("kind", ["hook", "subclass", "no bias"])
def test_what_is_not_a_plain_linear_layer_is_called(kind):
    class Adapted(nn.Linear):
        def forward(self, x):
            called.append(1)
            return super().forward(x)

    (first, second, third), x = make()
    called = []
    if kind == "hook":
        second.register_forward_hook(lambda *_: called.append(1))
    elif kind == "subclass":
        second = Adapted(8, 10)
    else:
        second = nn.Linear(8, 10, bias=False)
    outputs = joint_linear((first, second, third), x)
    assert torch.equal(outputs[1], second(x))
    assert called or kind == "no bias"
    sum(output.sum() for output in outputs).backward()
    assert x.grad is not None


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_in_an_encoder(pooling, monkeypatch):
    texts = PackedTexts.from_sequences([[0, 5, 6, 7, 2], [0, 9, 2], [0, 4, 8, 2]])
    results = []
    for devices, added in (("cpu",), {"cls": 3, "mean": 4}[pooling]), ((), 0):  # of two layers
        monkeypatch.setattr(module, "_DEVICES", devices)
        encoder = make_encoder().eval()
        embeddings = embed_packed(encoder, texts, pooling=pooling)
        with Calls() as calls:
            (embeddings * torch.linspace(-1, 1, embeddings.numel()).view_as(embeddings)).sum().backward()
        assert calls.counts[ADDMM] == added
        results.append((embeddings, {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}))
    (embeddings, gradients), (expected, wanted) = results
    torch.testing.assert_close(embeddings, expected)
    assert gradients.keys() == wanted.keys()
    for name, want in wanted.items():
        torch.testing.assert_close(gradients[name], want, msg=name)
