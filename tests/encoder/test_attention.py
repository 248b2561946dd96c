import pytest
import torch
import torch.nn.functional as F

from clpl_moe.encoder.attention import attention, power_attention, product_attention
from helpers.calls import Calls


def make_states(texts=3, heads=4, tokens=37, width=16, queries=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(texts * (queries or tokens), heads, width)] + [(texts * tokens, heads, width)] * 2
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def run(function, states, texts, dropout):
    """Output and gradients in float32, of states (tokens, heads, d) as they lie in a packed stream."""
    torch.manual_seed(1)
    output = function(*(x.unflatten(0, (texts, -1)).transpose(1, 2) for x in states), dropout)
    weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
    gradients = torch.autograd.grad((output.float() * weights).sum(), states)
    return [x.float() for x in (output, *gradients)]


def stock(query, key, value, dropout):
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)


@pytest.mark.parametrize("queries", [None, 1])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("texts", "tokens"), [(1, 1), (3, 37), (2, 130)])
def test_products_are_torchs_attention(texts, tokens, dropout, queries):
    """Dropout included: with one seed both drop the same probabilities."""
    states = make_states(texts, tokens=tokens, queries=queries)
    found, expected = (run(function, states, texts, dropout) for function in (product_attention, stock))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("queries", [None, 1])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_in_bfloat16(dropout, queries, fast, monkeypatch):
    monkeypatch.setattr("clpl_moe.encoder.attention.fast_bfloat16", lambda device: fast)
    states = make_states(queries=queries, dtype=torch.bfloat16)
    exact = run(stock, [x.detach().float().requires_grad_() for x in states], 3, dropout)
    for found, expected in zip(run(attention, states, 3, dropout), exact, strict=True):
        assert (found - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_only_fast_bfloat16_takes_products(dtype, fast, monkeypatch):
    monkeypatch.setattr("clpl_moe.encoder.attention.fast_bfloat16", lambda device: fast)
    with Calls() as calls:
        run(attention, make_states(dtype=dtype), 3, 0.0)
    assert (calls.counts[torch.ops.aten._softmax.default] == 1) == (fast and dtype == torch.bfloat16)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("queries", [None, 1])
def test_the_scores_of_long_texts_are_not_held(queries, inference, monkeypatch):
    monkeypatch.setattr("clpl_moe.encoder.attention.fast_bfloat16", lambda device: True)
    for tokens, held in ((1024, True), (1025, False)):
        states = [x.detach() for x in make_states(1, 2, tokens, queries=queries, dtype=torch.bfloat16)]
        with torch.inference_mode(inference), Calls() as calls:
            attention(*(x.unflatten(0, (1, -1)).transpose(1, 2) for x in states))
        products = calls.counts[torch.ops.aten.bmm.default] + calls.counts[torch.ops.aten.matmul.default]
        assert (products > 0) == held


@pytest.mark.parametrize("queries", [None, 1])
def test_in_inference_mode_powers_take_the_place_of_softmax(queries, monkeypatch):
    monkeypatch.setattr("clpl_moe.encoder.attention.fast_bfloat16", lambda device: True)
    states = [x.detach() for x in make_states(queries=queries, dtype=torch.bfloat16)]
    parts = [x.unflatten(0, (3, -1)).transpose(1, 2) for x in states]
    with torch.inference_mode(), Calls() as calls:
        found = attention(*parts)
    expected = F.scaled_dot_product_attention(*(x.float() for x in parts))
    assert calls.counts[torch.ops.aten._softmax.default] == 0
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("scale", [20, -20, 1e4, -1e4])
def test_scores_that_powers_cannot_hold(scale):
    """All scores of a row are far above 0, or far below."""
    query = torch.rand(2, 4, 9, 16).add(1).bfloat16()
    key, value = scale * torch.rand(2, 4, 9, 16).add(1).bfloat16(), torch.randn(2, 4, 9, 16).bfloat16()
    found = power_attention(query, key, value)
    assert found.isfinite().all()
    assert torch.equal(found, product_attention(query, key, value))


def test_nan_stays_nan():
    states = [torch.randn(1, 2, 5, 16).bfloat16() for _ in range(3)]
    states[0][0, 1, 2] = torch.nan
    assert power_attention(*states)[0, 1, 2].isnan().all()
