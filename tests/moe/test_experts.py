"""Every way of computing experts against a loop over slots, in values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clpl_moe import MoEConfig, inject_moe
from clpl_moe.moe import kernel_choice
from clpl_moe.moe.balance import track_routers
from clpl_moe.moe.dispatch import Assignment, assign, gather, pick, restore
from clpl_moe.moe.experts import Experts, expert_linear
from helpers.calls import saved_elements
from helpers.tiny import make_encoder, make_moe

IN, OUT = 16, 24
# Experts of each token (T, k), out of how many. The grouped kernel needs rows of whole 16 bytes, hence 16 and 24.
CASES = {
    "two experts": ([[0], [1], [1], [0], [1]], 2),
    "empty experts": ([[3], [1], [3], [1], [1]], 5),
    "all to the last": ([[2], [2], [2]], 3),
    "all to the first": ([[0], [0], [0]], 3),
    "one token": ([[1]], 2),
    "two of three": ([[0, 2], [2, 1], [2, 0], [0, 1]], 3),
    "three of five": ([[0, 2, 4], [2, 4, 0], [4, 0, 2]], 5),
    "all of two": ([[0, 1]] * 5, 2),
    "all of three, one token": ([[0, 1, 2]], 3),
    "one of one": ([[0]] * 3, 1),
}
TOLERANCE = {
    torch.float64: {},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 0.03, "atol": 0.08},
}


@pytest.fixture(params=["slices", "grouped"])
def kernel(request, monkeypatch):
    """Each implementation of sorted experts; grouped_mm also runs on CPUs, where it is not chosen."""
    if request.param == "grouped":
        if not hasattr(F, "grouped_mm"):
            pytest.skip("this torch has no grouped_mm")
        monkeypatch.setattr(kernel_choice, "has_grouped_kernel", lambda slots, weight: True)
    return request.param


def make_case(name, dtype=torch.float32, *, unit=False):
    """Experts of each token; tokens, weight, bias and weights of the assignments as leaves; the assignment."""
    experts, num_experts = CASES[name]
    generator = torch.Generator().manual_seed(len(name))
    experts = torch.tensor(experts)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    tokens, weight, bias = draw(len(experts), IN), draw(num_experts, OUT, IN), draw(num_experts, OUT)
    wide = torch.promote_types(dtype, torch.float32)
    weights = torch.rand(experts.shape, generator=generator).to(wide)
    weights = (torch.ones_like(weights) if unit else weights).requires_grad_()
    if experts.shape[1] == num_experts:
        assignment = Assignment(weights, torch.full((num_experts,), len(experts)))
    else:
        assignment = assign(experts, weights, num_experts, unit=unit)
    return experts, [tokens, weight, bias, weights], assignment


def loop(experts, tokens, weight, bias, weights):
    """Σ_j weights[t, j] · (W x + b) of expert j of token t, in float64."""
    tokens, weight, bias, weights = (value.double() for value in (tokens, weight, bias, weights))
    return torch.stack(
        [
            sum(weights[t, j] * (weight[e] @ tokens[t] + bias[e]) for j, e in enumerate(row))
            for t, row in enumerate(experts.tolist())
        ]
    )


def through_experts(leaves, assignment):
    """The weighted results of all experts, in the tokens' order."""
    tokens, weight, bias, _ = leaves
    results = expert_linear(gather(tokens, assignment), weight, bias, assignment, weigh=True)
    return restore(results, assignment, None, len(tokens))


def compare(found, expected, leaves, tolerance):
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, **tolerance)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients = torch.autograd.grad(found, leaves, direction.to(found.dtype))
    for leaf, gradient, wanted in zip(leaves, gradients, torch.autograd.grad(expected, leaves, direction), strict=True):
        assert gradient.dtype == leaf.dtype
        torch.testing.assert_close(gradient, wanted, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_loop_over_slots(kernel, name, dtype):
    experts, leaves, assignment = make_case(name, dtype)
    compare(through_experts(leaves, assignment), loop(experts, *leaves), leaves, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["two experts", "empty experts", "all to the first", "one token"])
def test_weights_of_one_multiply_nothing_and_have_a_gradient(kernel, name, dtype):
    experts, leaves, assignment = make_case(name, dtype, unit=True)
    compare(through_experts(leaves, assignment), loop(experts, *leaves), leaves, TOLERANCE[dtype])
    tokens, weight, bias, _ = leaves
    slots = gather(tokens, assignment)
    weighed = expert_linear(slots, weight, bias, assignment, weigh=True)
    assert torch.equal(weighed, expert_linear(slots, weight, bias, assignment, weigh=False))


@pytest.mark.parametrize("name", CASES)
def test_double_precision(name):
    experts, leaves, assignment = make_case(name, torch.float64)
    compare(through_experts(leaves, assignment), loop(experts, *leaves), leaves, TOLERANCE[torch.float64])


@pytest.mark.parametrize("name", CASES)
def test_two_layers_of_experts(kernel, name):
    """Slots go from one to the next, and are weighed and summed after the second."""
    experts, leaves, assignment = make_case(name)
    _, (_, weight, bias, _), _ = make_case(name)
    second, second_bias = weight.detach().transpose(1, 2).contiguous(), bias.detach()[:, :IN].contiguous()
    leaves += [second.requires_grad_(), second_bias.requires_grad_()]
    slots = expert_linear(gather(leaves[0], assignment), *leaves[1:3], assignment, weigh=False)
    found = restore(expert_linear(slots.tanh(), *leaves[4:], assignment, weigh=True), assignment, None, len(experts))
    tokens, weight, bias, weights, second, second_bias = (leaf.double() for leaf in leaves)

    def expert(e, x):
        return second[e] @ (weight[e] @ x + bias[e]).tanh() + second_bias[e]

    rows = enumerate(experts.tolist())
    expected = torch.stack([sum(weights[t, j] * expert(e, tokens[t]) for j, e in enumerate(row)) for t, row in rows])
    compare(found, expected, leaves, {"rtol": 1e-4, "atol": 1e-4})


@pytest.mark.parametrize("name", ["empty experts", "two of three", "all of two"])
def test_autocast(kernel, name):
    experts, leaves, assignment = make_case(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = through_experts(leaves, assignment)
    assert found.dtype == torch.bfloat16
    compare(found, loop(experts, *leaves), leaves, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("name", ["empty experts", "two of three", "all of two"])
def test_no_token_at_all(name):
    _, leaves, _ = make_case(name)
    experts = torch.empty(0, len(CASES[name][0][0]), dtype=torch.int64)
    num_experts, weights = CASES[name][1], torch.empty(experts.shape)
    mixed = experts.shape[1] == num_experts
    counts = torch.zeros(num_experts, dtype=torch.int64)
    assignment = Assignment(weights, counts) if mixed else assign(experts, weights, num_experts, unit=False)
    found = through_experts([leaves[0][:0], *leaves[1:]], assignment)
    assert found.shape == (0, OUT)
    gradients = torch.autograd.grad(found.sum(), leaves[1:3])
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("needed", range(4))
@pytest.mark.parametrize("name", ["empty experts", "two of three", "all of two"])
def test_gradients_of_what_needs_them_only(kernel, name, needed):
    """Frozen layers and the first layer of a network; a router alone."""
    experts, leaves, assignment = make_case(name)
    expected = torch.autograd.grad(loop(experts, *leaves).sum(), leaves)[needed]
    for index, leaf in enumerate(leaves):
        leaf.requires_grad_(index == needed)
    through_experts(leaves, assignment).sum().backward()
    torch.testing.assert_close(leaves[needed].grad, expected, **TOLERANCE[torch.float32])
    assert sum(leaf.grad is not None for leaf in leaves) == 1


@pytest.mark.parametrize("name", ["two experts", "two of three", "all of two"])
def test_padding_is_left_out_and_comes_back_as_zeros(name):
    experts, leaves, assignment = make_case(name)
    real = torch.tensor([1, 3, 4, 7, 8])[: len(experts)]
    batch = torch.randn(10, IN).index_copy(0, real, leaves[0].detach()).requires_grad_()
    tokens = pick(batch, real)
    results = expert_linear(gather(tokens, assignment), *leaves[1:3], assignment, weigh=True)
    found = restore(results, assignment, real, 10)
    picked = loop(experts, batch[real], *leaves[1:])
    expected = torch.zeros(10, OUT, dtype=torch.float64).index_copy(0, real, picked)
    compare(found, expected, [batch, *leaves[1:]], TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", ["two experts", "two of three", "all of two"])
def test_outputs_are_not_kept_for_the_gradient_of_the_weights(name):
    experts, leaves, assignment = make_case(name)
    slots = gather(leaves[0], assignment)
    sizes, _ = saved_elements(lambda: expert_linear(slots, *leaves[1:3], assignment, weigh=True))
    assert all(numel < OUT * len(experts) for numel, _ in sizes if numel != slots.numel())


@pytest.mark.parametrize(("num_experts", "top_k"), [(2, 1), (8, 2), (2, 2)])
def test_sizes_stay_on_the_device_where_there_is_a_grouped_kernel(monkeypatch, num_experts, top_k):
    """A layer forward and backward, records of its router included, reads no number."""
    monkeypatch.setattr(kernel_choice, "has_grouped_kernel", lambda slots, weight: True)

    def read(*_):
        raise AssertionError("waits for the device")

    encoder = make_moe(num_experts=num_experts, top_k=top_k).train()
    track_routers(encoder)
    layer, hidden = encoder.encoder.layer[0], torch.randn(2, 9, 32)
    with monkeypatch.context() as patch:
        for name in ("tolist", "item", "nonzero", "__bool__", "__int__"):
            patch.setattr(torch.Tensor, name, read)
        patch.setattr(torch, "bincount", read)
        output = layer(hidden)
        output.backward(torch.randn_like(output))  # not all the same: layer norm lets none of that through
    assert layer.intermediate.router.weight.grad.any()


@pytest.mark.gpu
@pytest.mark.parametrize(("num_experts", "top_k"), [(2, 1), (8, 1), (8, 2), (2, 2)])
def test_a_step_on_a_gpu_waits_for_nothing(num_experts, top_k):
    if num_experts != top_k and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no grouped kernel below compute capability 9.0")
    encoder = inject_moe(make_encoder(hidden_size=64, intermediate_size=128), MoEConfig(num_experts, top_k))
    encoder.to(device="cuda", dtype=torch.bfloat16).train()
    layer, hidden = encoder.encoder.layer[0], torch.randn(4, 32, 64, device="cuda", dtype=torch.bfloat16)

    def step():
        layer(hidden).square().mean().backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_experts_from_a_linear_and_back():
    linear = nn.Linear(4, 5, dtype=torch.bfloat16)
    experts = Experts.from_linear(linear, 3)
    assert experts.weight.shape == (3, 5, 4)
    assert experts.weight.dtype == torch.bfloat16
    with torch.no_grad():
        experts.weight[1] += 3
        experts.bias[2] -= 3
    merged = experts.merged()
    assert merged.weight.dtype == torch.bfloat16
    torch.testing.assert_close(merged.weight, linear.weight + 1, rtol=0, atol=0.02)
    torch.testing.assert_close(merged.bias, linear.bias - 1, rtol=0, atol=0.02)


def test_the_description_names_the_sizes():
    assert repr(Experts(2, 3, 4)) == "Experts(num_experts=2, in_features=3, out_features=4)"
