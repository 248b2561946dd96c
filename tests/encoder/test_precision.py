from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clpl_moe.encoder import Encoder, precision
from clpl_moe.encoder.precision import autocast, compute_dtype, onednn_linear
from clpl_moe.encoder.settings import EmbeddingSettings
from helpers.calls import Calls
from helpers.tiny import make_encoder


def test_compute_dtype(monkeypatch):
    model = make_encoder()
    for fast, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(precision, "fast_bfloat16", lambda device, fast=fast: fast)
        assert compute_dtype(model) == expected
    assert compute_dtype(model, torch.bfloat16) == torch.bfloat16
    assert compute_dtype(model.bfloat16(), torch.float32) == torch.bfloat16


@pytest.mark.parametrize("inside", [False, True])
def test_autocast_decides_whatever_stands_around_it(inside):
    linear = torch.nn.Linear(4, 4)
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        for dtype in (torch.float32, torch.bfloat16):
            with autocast(linear, dtype):
                assert linear(torch.ones(4)).dtype == dtype


if torch.backends.mkldnn.is_available():
    LINEAR, PACK = torch.ops.mkldnn._linear_pointwise.default, torch.ops.mkldnn._reorder_linear_weight.default


@pytest.fixture
def onednn():
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch has no oneDNN here")
    return precision


@pytest.fixture(params=[True, False], ids=["AMD", "Intel"])
def faster(request, monkeypatch, onednn):
    monkeypatch.setattr(onednn, "_faster_than_mkl", lambda: request.param)
    return request.param


@pytest.fixture
def amd(monkeypatch, onednn):
    monkeypatch.setattr(onednn, "_faster_than_mkl", lambda: True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 24), (37, 24), (1, 50, 24), (3, 7, 24)])
def test_computes_what_linear_does(amd, shape, bias):
    linear = nn.Linear(24, 40, bias=bias)
    with torch.inference_mode(), onednn_linear(linear, torch.float32), Calls() as calls:
        for seed in range(3):
            inputs = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            expected = inputs.double() @ linear.weight.double().T + (linear.bias.double() if bias else 0)
            torch.testing.assert_close(linear(inputs).double(), expected, atol=1e-5, rtol=1e-5)
    assert (calls.counts[LINEAR], calls.counts[PACK]) == (3, 1)


def test_inputs_that_are_not_contiguous(amd):
    linear = nn.Linear(24, 40)
    wide = torch.randn(11, 48)
    with torch.inference_mode(), onednn_linear(linear, torch.float32):
        for inputs in (wide[:, ::2], wide[:, 5:29], wide[:, :24].expand(2, 11, 24), torch.randn(24, 11).T):
            torch.testing.assert_close(linear(inputs), F.linear(inputs.contiguous(), linear.weight, linear.bias))


def test_each_layer_has_its_own_weights(amd):
    layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(5))
    inputs = torch.randn(9, 16)
    with torch.inference_mode():
        expected = [layer(inputs) for layer in layers]
        with onednn_linear(layers, torch.float32):
            for _ in range(3):
                for layer, values in zip(layers, expected, strict=True):
                    torch.testing.assert_close(layer(inputs), values)


def test_weights_that_are_made_on_the_way_are_not_kept(amd):
    layer = nn.Linear(16, 16)
    inputs = torch.randn(9, 16)
    with torch.inference_mode(), onednn_linear(layer, torch.float32), Calls() as calls:
        for factor in range(8):
            torch.testing.assert_close(F.linear(inputs, layer.weight * factor), inputs @ layer.weight.T * factor)
    assert calls.counts[LINEAR] == 0


def test_other_precisions_and_empty_inputs_run_as_ever(amd, monkeypatch):
    monkeypatch.setattr(precision, "fast_bfloat16", lambda device: False)
    half = nn.Linear(16, 16, dtype=torch.bfloat16)
    single = nn.Linear(16, 16)
    with torch.inference_mode(), Calls() as calls:
        with onednn_linear(half, torch.bfloat16):
            half(torch.randn(3, 16, dtype=torch.bfloat16))
        with onednn_linear(single, torch.bfloat16), torch.autocast("cpu", torch.bfloat16):
            assert single(torch.randn(3, 16)).dtype == torch.bfloat16
        with onednn_linear(single, torch.float32):
            assert single(torch.zeros(0, 16)).shape == (0, 16)
    assert calls.counts[LINEAR] == 0


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_fast_bfloat16(weights, bias, onednn, monkeypatch):
    """The weights are packed once, cast before where they are float32; what leaves autocast is computed as ever."""
    monkeypatch.setattr(onednn, "fast_bfloat16", lambda device: True)
    linear = nn.Linear(24, 40, bias=bias, dtype=weights)
    cast = weights == torch.float32
    with torch.inference_mode(), onednn_linear(linear, torch.bfloat16), Calls() as calls:
        for _ in range(3):
            inputs = torch.randn(2, 7, 24)
            expected = inputs.bfloat16().float() @ linear.weight.bfloat16().float().T + (linear.bias if bias else 0)
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                found = linear(inputs if cast else inputs.bfloat16())
            assert found.dtype == torch.bfloat16
            torch.testing.assert_close(found.float(), expected, atol=0.02, rtol=0.02)
        assert (calls.counts[LINEAR], calls.counts[PACK]) == (3, 1)
        if cast:
            assert linear(inputs).dtype == torch.float32
            with torch.autocast("cpu", enabled=False):
                torch.testing.assert_close(linear(inputs), F.linear(inputs, linear.weight * 1, linear.bias))
    assert calls.counts[LINEAR] == 3


def test_encode_in_bfloat16_packs(tiny_encoder, onednn, monkeypatch):
    monkeypatch.setattr(onednn, "fast_bfloat16", lambda device: True)
    encoder = Encoder.load(tiny_encoder, device="cpu")
    texts = [f"word {i} " * (1 + i % 7) for i in range(40)]
    how = {"max_length": 20, "batch_tokens": 64, "progress": False}
    with Calls() as calls:
        embeddings = encoder.encode_passages(texts, **how)
    assert calls.counts[LINEAR] > calls.counts[PACK] > 0
    monkeypatch.setattr("clpl_moe.encoder.encode.onednn_linear", lambda model, dtype: nullcontext())
    torch.testing.assert_close(embeddings, encoder.encode_passages(texts, **how), atol=0.02, rtol=0)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_encode_on_either_processor(faster, pooling, tiny_encoder, monkeypatch):
    settings = EmbeddingSettings(pooling=pooling)
    encoder = Encoder.load(tiny_encoder, settings=settings, compute_dtype=torch.float32, device="cpu")
    texts = [f"word {i} " * (1 + i % 7) for i in range(40)]
    how = {"max_length": 20, "batch_tokens": 64, "progress": False}
    with Calls() as calls:
        embeddings = encoder.encode_passages(texts, **how)
    assert (calls.counts[LINEAR] > 0) == (calls.counts[PACK] > 0) == faster
    monkeypatch.setattr("clpl_moe.encoder.encode.onednn_linear", lambda model, dtype: nullcontext())
    torch.testing.assert_close(embeddings, encoder.encode_passages(texts, **how), atol=1e-5, rtol=0)
