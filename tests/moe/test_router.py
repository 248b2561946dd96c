"""The routers' weights, their registry, and what a class may promise."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clpl_moe import MoEConfig
from clpl_moe.moe import Router, register_router
from clpl_moe.moe import router as router_module
from clpl_moe.moe.layer_state import LayerState
from clpl_moe.moe.router import StraightThrough, router_class, scores
from helpers.calls import saved_elements
from helpers.tiny import make_moe

IN = 16
ROUTERS = ["straight_through", "softmax_topk", "topk_softmax"]
SIZES = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 3)]


def make_router(kind, num_experts, top_k):
    router = router_class(kind)(IN, num_experts, top_k).double()
    nn.init.normal_(router.weight)
    return router


@pytest.mark.parametrize("kind", ROUTERS)
@pytest.mark.parametrize(("num_experts", "top_k"), SIZES)
def test_weights_sum_to_one(kind, num_experts, top_k):
    """softmax_topk only while the router is undecided, as it is at the start."""
    router = make_router(kind, num_experts, top_k)
    if kind == "softmax_topk":
        router.reset_parameters(0.02)
        assert router.weight.std() < 1e-7
    weights = router(torch.randn(7, IN, dtype=torch.float64), LayerState()).weights
    torch.testing.assert_close(weights.sum(1), torch.ones(7, dtype=torch.float64), rtol=0, atol=1e-6)
    if kind == "straight_through" and top_k == 1:
        assert (weights == 1).all()


def test_scores_are_computed_in_float32_under_autocast():
    router = make_router("straight_through", 4, 2).float()
    x = torch.randn(64, IN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = router(x, LayerState())
    outside = router(x, LayerState())
    assert inside.weights.dtype == torch.float32
    assert torch.equal(inside.weights, outside.weights)
    assert torch.equal(inside.rows, outside.rows)


def test_nothing_is_sorted_where_all_experts_are_chosen():
    router = make_router("straight_through", 3, 3).float()
    x = torch.randn(5, IN)
    assignment = router(x, LayerState())
    assert assignment.mixed
    torch.testing.assert_close(assignment.weights, (x @ router.weight.T).softmax(1))
    assert assignment.counts.tolist() == [5, 5, 5]


@pytest.mark.parametrize("shape", [(0, IN), (1, IN), (7, IN)])
def test_scores_of_bf16_tokens_are_those_of_float32(shape):
    x, weight = torch.randn(shape).bfloat16().requires_grad_(), torch.randn(3, IN).requires_grad_()
    found, expected = scores(x, weight), x.float() @ weight.T
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    direction = torch.randn(found.shape)
    gradients = torch.autograd.grad(found, (x, weight), direction)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, (x, weight), direction)):
        torch.testing.assert_close(gradient, wanted)


def test_scores_keep_no_wide_copy_of_the_tokens():
    x, weight = torch.randn(50, IN).bfloat16().requires_grad_(), torch.randn(3, IN).requires_grad_()
    sizes, _ = saved_elements(lambda: scores(x * 1, weight))
    assert (50 * IN, 2) in sizes
    assert (50 * IN, 4) not in sizes


def test_the_description_names_the_sizes():
    assert repr(make_router("topk_softmax", 2, 1)) == "TopKSoftmax(in_features=16, num_experts=2, top_k=1)"


@pytest.fixture
def register(monkeypatch):
    """``register_router`` for one test."""
    monkeypatch.setattr(router_module, "_ROUTERS", dict(router_module._ROUTERS))
    return register_router


class Doubting(StraightThrough):
    """Prefers the second best expert, with less than its whole weight."""

    def choose(self, logits):
        return logits.topk(self.top_k + 1, dim=-1).indices[:, 1:]

    def weigh(self, logits, experts):
        return super().weigh(logits, experts) * 0.5


def test_a_router_of_ones_own_in_an_encoder(register):
    register("doubting")(Doubting)
    encoder = make_moe(num_experts=3, router="doubting")
    router, experts = encoder.encoder.layer[0].intermediate.router, encoder.encoder.layer[0].intermediate.dense
    assert type(router) is Doubting
    x = torch.randn(1, 5, 32)
    chosen = (x[0] @ router.weight.T).topk(2).indices[:, 1]
    expected = torch.einsum("tfd,td->tf", experts.weight[chosen], x[0]) + experts.bias[chosen]
    encoder.encoder.layer[0].intermediate.hands_over = False
    found = encoder.encoder.layer[0].intermediate(x)
    torch.testing.assert_close(found[0], F.gelu(0.5 * expected))
    found.square().sum().backward()
    assert router.weight.grad.any()


def test_promises_are_not_inherited():
    assert (StraightThrough.unit_at_top_1, StraightThrough.fused_as) == (True, "straight_through")
    assert (Router.unit_at_top_1, Router.fused_as) == (Doubting.unit_at_top_1, Doubting.fused_as) == (False, None)
    assignment = Doubting(IN, 3, 1)(torch.randn(4, IN), LayerState())
    assert not assignment.unit


def test_a_router_that_defines_no_weights_says_so():
    class Bare(Router):
        pass

    router = Bare(IN, 2, 1)
    router.reset_parameters(1.0)
    with pytest.raises(NotImplementedError, match="Bare does not define weigh"):
        router(torch.randn(3, IN), LayerState())


def test_names_are_taken_once(register):
    with pytest.raises(
        ValueError, match="'straight_through' is clpl_moe.moe.router.StraightThrough: choose another name"
    ):
        register("straight_through")(Doubting)
    register("doubting")(Doubting)
    register("doubting")(Doubting)  # a notebook's cell that is run twice
    with pytest.raises(TypeError, match="is no router: derive it from"):
        register("linear")(nn.Linear)


@pytest.mark.parametrize(
    ("name", "hint"), [("straight_trough", r"\(did you mean 'straight_through'\?\)"), ("noisy", "register your own")]
)
def test_an_unknown_router(name, hint):
    with pytest.raises(ValueError, match=f"router is '{name}': choose one of straight_through, softmax_topk.*{hint}"):
        MoEConfig(router=name)


def test_settings_do_not_load_torch():
    script = "import sys; import clpl_moe.moe.config; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
