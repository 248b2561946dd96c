"""Sum and layer norm in one pass, beside torch's: in Triton's interpreter, and with a CUDA device also compiled."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from clpl_moe.encoder import packing
from clpl_moe.encoder.add_norm import add_norm
from clpl_moe.encoder.packing import PackedTexts, embed_packed
from clpl_moe.moe import layer as layer_module
from clpl_moe.moe.kernel_choice import is_exact_gelu
from clpl_moe.moe.layer import RoutedTokens
from helpers.kernel_devices import DEVICES
from helpers.tiny import DENSE_CLASSES, make_encoder, make_moe

HALF, FULL = torch.bfloat16, torch.float32


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize(("dtype", "residual_dtype"), [(HALF, FULL), (HALF, HALF), (FULL, FULL), (torch.float16, FULL)])
@pytest.mark.parametrize(("rows", "width"), [(70, 48), (1, 32), (32, 64)])
def test_values_and_gradients(rows, width, dtype, residual_dtype, permuted, trained, device):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator).to(dtype)
    residual = torch.randn(rows, width, generator=generator).to(residual_dtype)
    weight, bias = torch.randn(2, width, generator=generator)
    slots = torch.randperm(rows, generator=generator) if permuted else None
    leaves = [x.to(device).requires_grad_(), residual.to(device).requires_grad_()]
    leaves += [leaf.to(device).requires_grad_(trained) for leaf in (weight, bias)]
    results = add_norm(*leaves, 1e-5, None if slots is None else slots.to(device))
    assert [r.dtype for r in results] == ([residual_dtype] if dtype == residual_dtype else [residual_dtype, dtype])

    twins = [leaf.detach().double().cpu().requires_grad_(leaf.requires_grad) for leaf in leaves]
    expected = F.layer_norm((twins[0] if slots is None else twins[0][slots]) + twins[1], (width,), *twins[2:], 1e-5)
    exact = {"rtol": 1e-5, "atol": 1e-5}
    rounded = {"rtol": 0.02, "atol": 0.05}
    for result in results:
        torch.testing.assert_close(result.double().cpu(), expected, **(exact if result.dtype == FULL else rounded))
    directions = [torch.randn(rows, width, generator=generator).to(r.dtype) for r in results]
    gradients = torch.autograd.grad(results, [v for v in leaves if v.requires_grad], [d.to(device) for d in directions])
    wanted = torch.autograd.grad(
        [expected] * len(results), [v for v in twins if v.requires_grad], [d.double() for d in directions]
    )
    for gradient, want in zip(gradients, wanted, strict=True):
        tolerance = exact if gradient.dtype == FULL else rounded
        torch.testing.assert_close(gradient.double().cpu(), want, **tolerance)


@pytest.mark.parametrize("device", DEVICES)
def test_gradient_of_one_result_only(device):
    x, residual = torch.randn(5, 32, dtype=HALF, device=device), torch.randn(5, 32, device=device).requires_grad_()
    weight, bias = torch.ones(32, device=device), torch.zeros(32, device=device)
    for number in (0, 1):
        result = add_norm(x, residual, weight, bias, 1e-5)[number]
        direction = torch.randn(5, 32).to(result)
        (gradient,) = torch.autograd.grad(result, residual, direction)
        twin = residual.detach().requires_grad_()
        (wanted,) = torch.autograd.grad(F.layer_norm(x + twin, (32,), weight, bias), twin, direction.float())
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


def use_kernels(monkeypatch, used):
    """In the encoder and its experts, or not; on any device."""

    def closes(output, hidden, residual):
        routed = isinstance(hidden, RoutedTokens) and (hidden.assignment.mixed or hidden.assignment.top_k > 1)
        return used and type(output) in packing._OUTPUTS and not routed

    monkeypatch.setattr(packing, "_closes_in_one_pass", closes)

    def choose_kernel(tokens, weight, top_k, *, router, activation):
        fuses = used and tokens.dtype == HALF and top_k == 1 and router.fused_as and is_exact_gelu(activation)
        return "fused" if fuses else "sliced"

    monkeypatch.setattr(layer_module, "choose_kernel", choose_kernel)


ENCODERS = {
    **{kind: lambda kind=kind: make_encoder(kind) for kind in DENSE_CLASSES},
    "experts": make_moe,
    "two experts a token": lambda: make_moe(top_k=2, perturb=False),
    "experts of the whole FFN": lambda: make_moe("ffn"),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_under_autocast(name, pooling, device, monkeypatch):
    lengths = [7, 1, 12, 12]
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(4, 50, (length,), generator=generator).tolist() for length in lengths]
    direction, results = torch.randn(4, 32, generator=generator), []
    for used in (True, False):
        use_kernels(monkeypatch, used)
        encoder = ENCODERS[name]().to(device).train()
        texts = PackedTexts.from_sequences(sequences).to(device)
        with torch.autocast(device, HALF):
            embeddings = embed_packed(encoder, texts, pooling=pooling)
        (embeddings * direction.to(device)).sum().backward()
        results.append((embeddings, {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}))
    (found, gradients), (expected, wanted) = results
    assert found.dtype == FULL
    assert F.cosine_similarity(found, expected).min() > 0.99
    assert gradients.keys() == wanted.keys()
    for parameter in ("encoder.layer.0.attention.self.value.weight", "encoder.layer.1.output.LayerNorm.weight"):
        assert F.cosine_similarity(gradients[parameter].flatten(), wanted[parameter].flatten(), dim=0) > 0.98


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")  # the name before transformers 5.20
def test_frozen_layers_and_checkpointing(device, monkeypatch):
    use_kernels(monkeypatch, True)
    texts = PackedTexts.from_sequences([[5, 6, 7], [8, 9]]).to(device)
    found = []
    for checkpointed in (None, False, True):
        encoder = make_encoder().to(device).train().requires_grad_(False)
        encoder.encoder.layer[1].requires_grad_(True)
        if checkpointed is not None:
            encoder.gradient_checkpointing_enable({"use_reentrant": checkpointed})
        with torch.autocast(device, HALF):
            embed_packed(encoder, texts, pooling="mean").square().sum().backward()
        found.append([p.grad for p in encoder.parameters() if p.grad is not None])
    assert found[0]
    for gradients in found[1:]:
        assert all(a.equal(b) for a, b in zip(gradients, found[0], strict=True))


@pytest.mark.gpu
def test_used_in_half_precision_only(monkeypatch):
    calls = []
    monkeypatch.setattr(packing, "add_norm", lambda *args: calls.append(1) or add_norm(*args))
    encoder, texts = make_encoder().cuda(), PackedTexts.from_sequences([[5, 6, 7], [8, 9]]).to("cuda")
    exact = embed_packed(encoder, texts, pooling="mean")
    assert not calls
    with torch.autocast("cuda", HALF):
        half = embed_packed(encoder, texts, pooling="mean")
    assert len(calls) == 4  # two layers, each with the end of its attention and of its FFN
    assert F.cosine_similarity(exact, half).min() > 0.99
