"""The kernels beside plain torch: in Triton's interpreter, and with a CUDA device also compiled."""

import contextlib
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from clpl_moe.moe import kernels
from clpl_moe.moe import layer as layer_module
from clpl_moe.moe.balance import pop_router_terms, track_routers
from clpl_moe.moe.kernels import routed_gelu
from helpers.kernel_devices import DEVICES
from helpers.tiny import make_moe

# Tokens, width, experts, features; blocks of 64 tokens and 64 slots, so that one, some and broken ones occur.
SIZES = {
    "two experts": (70, 32, 2, 64),
    "more features than a block has": (130, 40, 3, 264),
    "one token": (1, 32, 3, 64),
    "a full block": (64, 64, 2, 64),
    "more experts than tokens": (9, 32, 40, 16),
}


def make_leaves(size, device, dtype=torch.float32):
    """Tokens, the router's weight, and the experts' weights and biases in bfloat16."""
    tokens, width, experts, features = size
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=generator).to(dtype)
    router = torch.randn(experts, width, generator=generator) * 0.3
    weight = (torch.randn(experts, features, width, generator=generator) * 0.2).bfloat16()
    bias = torch.randn(experts, features, generator=generator).bfloat16()
    return [leaf.to(device).requires_grad_() for leaf in (x, router, weight, bias)]


def plain(x, router, weight, bias, learns):
    """The same in float32, each token's expert by itself: activations and logits in the tokens' order."""
    logits = x @ router.t()
    experts = logits.argmax(1)
    probability = logits.softmax(1).gather(1, experts.unsqueeze(1))
    by = probability / probability.detach() if learns else torch.ones_like(probability)
    before = by * (torch.einsum("tfd,td->tf", weight[experts], x) + bias[experts])
    return F.gelu(before), logits, experts


def distance(found, expected):
    return ((found.float() - expected).norm() / expected.norm().clamp(min=1e-9)).item()


def compare(leaves, *, learns=True, through_logits=True):
    device = leaves[0].device
    found, logits, rows, slots, counts = routed_gelu(*leaves, learns=learns)
    twins = [leaf.detach().float().requires_grad_() for leaf in leaves]
    expected, expected_logits, experts = plain(*twins, learns)
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(expected.shape, generator=generator).to(device)
    of_logits = torch.randn(logits.shape, generator=generator).to(device) * through_logits

    assert found.dtype == torch.bfloat16
    assert rows[slots].equal(torch.arange(len(rows), device=device))
    assert (experts[rows].diff() >= 0).all()  # sorted by expert,
    assert (rows.diff() > 0)[experts[rows].diff() == 0].all()  # and within one in the order of tokens
    assert counts.tolist() == experts.bincount(minlength=len(counts)).tolist()
    torch.testing.assert_close(logits, expected_logits, rtol=1e-5, atol=1e-5)
    assert distance(found, expected[rows]) < 0.01
    outputs, directions = [found], [direction[rows].bfloat16()]
    if through_logits:
        outputs, directions = [*outputs, logits], [*directions, of_logits]
    gradients = torch.autograd.grad(outputs, leaves, directions, allow_unused=True)
    wanted = torch.autograd.grad(
        (expected * direction.bfloat16()).sum() + (expected_logits * of_logits).sum(), twins, retain_graph=True
    )
    for name, gradient, want, leaf in zip(("x", "router", "weight", "bias"), gradients, wanted, leaves, strict=True):
        if name == "router" and not learns and not through_logits:
            assert gradient is None
            assert not want.any()
            continue
        assert gradient.dtype == leaf.dtype
        assert distance(gradient, want) < 0.01, name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_values_and_gradients(size, dtype, device):
    compare(make_leaves(size, device, dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("learns", [False, True])
def test_gradients_through_the_activations_only(learns, device):
    compare(make_leaves(SIZES["two experts"], device), learns=learns, through_logits=False)


@pytest.mark.parametrize("device", DEVICES)
def test_all_tokens_to_one_expert_and_none_to_the_others(device):
    leaves = make_leaves((150, 32, 4, 64), device)
    with torch.no_grad():
        leaves[0][:, 0] = 1.0
        leaves[1].zero_()[2, 0] = 3.0
    compare(leaves)
    *_, counts = routed_gelu(*leaves, learns=True)
    assert counts.tolist() == [0, 0, 150, 0]


@pytest.mark.parametrize("device", DEVICES)
def test_equal_logits_and_nan_have_an_expert(device):
    leaves = make_leaves(SIZES["two experts"], device)
    with torch.no_grad():
        leaves[1].zero_()
        leaves[0][5] = torch.nan
    found, _, rows, slots, counts = routed_gelu(*leaves, learns=True)
    assert counts.sum() == len(rows)
    assert rows.sort().values.equal(torch.arange(len(rows), device=device))
    assert found.isnan().any(1).sum() == 1
    assert found[slots[5]].isnan().all()


@pytest.mark.gpu
def test_the_same_again():
    """No sum depends on what happens to be first."""
    size, results = (3000, 64, 3, 128), []
    for _ in range(2):
        leaves = make_leaves(size, "cuda")
        found, logits, *_ = routed_gelu(*leaves, learns=True)
        (found.float().square().sum() + logits.square().sum()).backward()
        results.append([found, *(leaf.grad for leaf in leaves)])
    assert all(first.equal(second) for first, second in zip(*results, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("router", ["straight_through", "topk_softmax"])
def test_in_a_layer(router, device, monkeypatch):
    """With padding, and what the router leaves for the balance loss: as without the kernels, about."""
    direction, results = torch.randn(6, 20, 32, generator=torch.Generator().manual_seed(3)), []
    for used in (True, False):
        monkeypatch.setattr(layer_module, "choose_kernel", lambda *_, used=used, **__: "fused" if used else "sliced")
        encoder = make_moe(num_experts=3, router=router).to(device=device, dtype=torch.bfloat16).train()
        track_routers(encoder)
        ids = torch.randint(4, 50, (6, 20), generator=torch.Generator().manual_seed(2)).to(device)
        mask = (torch.arange(20, device=device) < torch.tensor([[20], [3], [7], [20], [1], [11]], device=device)).long()
        hidden = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        terms = pop_router_terms(encoder)
        ((hidden * direction.to(device))[mask.bool()].sum() + 10 * terms.balance).backward()
        gradients = {n: p.grad.float() for n, p in encoder.named_parameters() if p.grad is not None}
        results.append((hidden[mask.bool()].float(), terms, gradients))
    (found, terms, gradients), (expected, wanted_terms, wanted) = results
    assert F.cosine_similarity(found, expected).mean() > 0.999
    torch.testing.assert_close(terms.load, wanted_terms.load, atol=0.05, rtol=0)
    torch.testing.assert_close(terms.balance, wanted_terms.balance, atol=0.05, rtol=0)
    for layer in (0, 1):
        for name in ("router.weight", "dense.weight", "dense.bias"):
            name = f"encoder.layer.{layer}.intermediate.{name}"
            assert F.cosine_similarity(gradients[name].flatten(), wanted[name].flatten(), dim=0) > 0.9, name


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, True), ({"top_k": 2}, False), ({"router": "softmax_topk"}, False), ({"target": "output"}, False)],
)
def test_used_where_they_fit(options, expected, monkeypatch):
    calls = []
    monkeypatch.setattr(
        layer_module, "routed_gelu", lambda *args, **kwargs: calls.append(1) or routed_gelu(*args, **kwargs)
    )
    encoder = make_moe(**options).cuda()
    ids = torch.randint(4, 50, (2, 8)).cuda()
    encoder(input_ids=ids)
    assert not calls  # float32
    with torch.autocast("cuda", torch.bfloat16):
        encoder(input_ids=ids)
    assert bool(calls) == expected


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


@pytest.fixture
def forget():
    kernels.can_compile.cache_clear()
    yield
    kernels.can_compile.cache_clear()


def pretend_gpu(monkeypatch, capability=(9, 0)):
    """A device of the type CUDA whose tensors are on the CPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, dtype, device: empty(*size, dtype=dtype))
    return torch.device("cuda")


@pytest.mark.usefixtures("forget")
def test_not_for_a_cpu():
    assert not kernels.can_compile(torch.device("cpu"))


@pytest.mark.usefixtures("forget")
def test_not_for_old_devices(monkeypatch):
    assert not kernels.can_compile(pretend_gpu(monkeypatch, (7, 5)))


@pytest.mark.usefixtures("forget")
def test_says_once_why_not(monkeypatch):
    class Kernel:
        def __getitem__(self, grid):
            raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(kernels, "_write_kernel", Kernel())
    device = pretend_gpu(monkeypatch)
    with pytest.warns(
        UserWarning, match=r"RuntimeError: Failed to find C compiler\.\).*apt-get install gcc python3-dev"
    ):
        assert not kernels.can_compile(device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not kernels.can_compile(device)


@pytest.mark.usefixtures("forget")
def test_where_a_kernel_runs(monkeypatch):
    calls = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda x: calls.append(x)

    monkeypatch.setattr(kernels, "_write_kernel", Kernel())
    assert kernels.can_compile(pretend_gpu(monkeypatch))
    assert len(calls) == 1


@pytest.mark.usefixtures("forget")
@pytest.mark.gpu
def test_on_a_gpu():
    assert kernels.can_compile(torch.device("cuda"))


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
