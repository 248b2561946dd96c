"""Experts and routers against a loop over tokens that is written from their definition."""

import pytest
import torch
from torch import nn

from clpl_moe.moe.experts import Experts
from clpl_moe.moe.layer import MoEFFNIntermediate, MoEFFNOutput, MoEIntermediate, MoEOutput
from clpl_moe.moe.layer_state import LayerState
from clpl_moe.moe.router import router_class

HIDDEN, FFN = 6, 10
ROUTERS = ["straight_through", "softmax_topk", "topk_softmax"]
SIZES = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 3)]


def make_router(kind, num_experts, top_k, features=HIDDEN):
    router = router_class(kind)(features, num_experts, top_k).double()
    nn.init.normal_(router.weight)
    return router


def make_experts(num_experts, in_features, out_features):
    experts = Experts(num_experts, in_features, out_features).double()
    nn.init.normal_(experts.weight)
    nn.init.normal_(experts.bias)
    return experts


def set_mask(state, mask):
    """Tell which of the tokens are real, as an encoder's hooks do."""
    state.set_tokens(None if mask is None else mask.flatten().nonzero().squeeze(1))


def assignments(x, router, kind):
    """The experts of one token and their weights, from the routers' definition."""
    logits = router.weight @ x
    chosen = sorted(range(len(logits)), key=lambda e: -logits[e].item())[: router.top_k]
    p = torch.exp(logits) / torch.exp(logits).sum()
    if kind == "straight_through":  # the value of p over its sum, the gradient of p over a constant
        constant = sum(p[e].item() for e in chosen)
        return [(e, p[e] / constant) for e in chosen]
    if kind == "softmax_topk":
        return [(e, p[e] * len(logits) / router.top_k) for e in chosen]
    return [(e, torch.exp(logits[e]) / sum(torch.exp(logits[c]) for c in chosen)) for e in chosen]


def loop(hidden, mask, router, kind, compute):
    """``compute(expert, token)`` weighted and summed, one real token at a time; zeros at padding."""
    rows = []
    for b in range(hidden.shape[0]):
        for i in range(hidden.shape[1]):
            if mask is None or mask[b, i]:
                parts = [w * compute(e, hidden[b, i]) for e, w in assignments(hidden[b, i], router, kind)]
                rows.append(sum(parts))
            else:
                rows.append(torch.zeros(len(compute(0, hidden[b, i])), dtype=hidden.dtype))
    return torch.stack(rows).view(*hidden.shape[:2], -1)


def make_layer(target, kind, num_experts, top_k):
    """The modules of a target as one function of (hidden, residual); the same by the loop; modules; state."""
    torch.manual_seed(num_experts * 10 + top_k)
    state, activation, norm = LayerState(), nn.GELU(), nn.LayerNorm(HIDDEN).double()
    first, second = make_experts(num_experts, HIDDEN, FFN), make_experts(num_experts, FFN, HIDDEN)
    if target == "intermediate":
        module = MoEIntermediate(make_router(kind, num_experts, top_k), first, activation, state)

        def by_loop(hidden, residual, mask):
            mixed = loop(hidden, mask, module.router, kind, lambda e, x: first.weight[e] @ x + first.bias[e])
            return activation(mixed)

        return (lambda hidden, residual: module(hidden)), by_loop, [module], state
    if target == "output":
        module = MoEOutput(first, nn.Identity(), nn.Identity(), state, make_router(kind, num_experts, top_k))

        def by_loop(hidden, residual, mask):
            mixed = loop(hidden, mask, module.router, kind, lambda e, x: first.weight[e] @ x + first.bias[e])
            return mixed + residual.repeat(1, 1, 2)[..., :FFN]

        return (lambda h, r: module(h, r.repeat(1, 1, 2)[..., :FFN])), by_loop, [module], state
    one = MoEFFNIntermediate(make_router(kind, num_experts, top_k), first, activation, state)
    two = MoEFFNOutput(second, nn.Identity(), norm, state)

    def by_loop(hidden, residual, mask):
        def expert(e, x):
            return second.weight[e] @ activation(first.weight[e] @ x + first.bias[e]) + second.bias[e]

        return norm(loop(hidden, mask, one.router, kind, expert) + residual)

    return (lambda hidden, residual: two(one(hidden), residual)), by_loop, [one, two], state


def compare(layer, by_loop, modules, hidden, mask):
    """Values and all gradients of the layer and of the loop are equal."""
    hidden.requires_grad_()
    residual = torch.randn(hidden.shape, dtype=hidden.dtype).requires_grad_()
    wanted_from = [hidden, residual, *(p for module in modules for p in module.parameters())]
    found, expected = layer(hidden, residual), by_loop(hidden, residual, mask)
    torch.testing.assert_close(found, expected)
    direction = torch.randn(found.shape, dtype=found.dtype)
    kwargs = {"allow_unused": True, "materialize_grads": True}
    gradients = torch.autograd.grad((found * direction).sum(), wanted_from, **kwargs)
    for gradient, wanted in zip(
        gradients, torch.autograd.grad((expected * direction).sum(), wanted_from, **kwargs), strict=True
    ):
        torch.testing.assert_close(gradient, wanted)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ROUTERS)
@pytest.mark.parametrize("target", ["intermediate", "output", "ffn"])
def test_equals_the_loop_over_tokens(target, kind, size):
    layer, by_loop, modules, state = make_layer(target, kind, *size)
    hidden = torch.randn(3, 5, HIDDEN, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 0, 1, 1]])
    set_mask(state, mask)
    compare(layer, by_loop, modules, hidden, mask)


@pytest.mark.parametrize("target", ["intermediate", "output", "ffn"])
def test_all_tokens_to_one_expert_and_none_to_the_others(target):
    layer, by_loop, modules, _ = make_layer(target, "straight_through", 4, 1)
    with torch.no_grad():
        modules[0].router.weight.zero_()[2, 0] = 3.0
    hidden = torch.randn(2, 3, HIDDEN, dtype=torch.float64)
    hidden[..., 0] = 1.0
    compare(layer, by_loop, modules, hidden, None)
    layer(hidden, hidden).square().sum().backward()
    used = modules[0].dense.weight.grad.flatten(1).any(1)
    assert used.tolist() == [False, False, True, False]


@pytest.mark.parametrize("target", ["intermediate", "output", "ffn"])
def test_one_token(target):
    layer, by_loop, modules, _ = make_layer(target, "straight_through", 3, 2)
    compare(layer, by_loop, modules, torch.randn(1, 1, HIDDEN, dtype=torch.float64), None)


@pytest.mark.parametrize("target", ["intermediate", "output", "ffn"])
def test_padding_only(target):
    layer, by_loop, modules, state = make_layer(target, "straight_through", 3, 2)
    mask = torch.zeros(2, 3)
    set_mask(state, mask)
    hidden = torch.randn(2, 3, HIDDEN, dtype=torch.float64)
    found = layer(hidden, hidden)
    torch.testing.assert_close(found, by_loop(hidden, hidden, mask))
    found.sum().backward()
    assert not modules[0].dense.weight.grad.any()
