"""Experts as a graph can hold them: each computes every token, and weights of 0 leave out what the router did not choose.

Sorting tokens by expert gives each expert as many as the data decide, which no graph can hold. Results are the same but for
rounding; the work is that of all experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clpl_moe.moe.experts import Experts
from clpl_moe.moe.install import dense_half, find_layers, has_experts, layer_states, remove_experts
from clpl_moe.moe.layer import MoEFFNIntermediate, MoEFFNOutput, MoEIntermediate, MoEOutput, RoutedOutput
from clpl_moe.moe.layer_state import remove_padding_hooks
from clpl_moe.moe.modeling_clpl_moe import become_dense
from clpl_moe.moe.router import Given, Random, Router


def compute_all_experts(encoder: nn.Module) -> None:
    """Replace the experts of an encoder in place; one without any stays as it is. Then it is of its dense class."""
    if not has_experts(encoder):
        return
    routers = [(state, router) for _, state, router in layer_states(encoder)]
    if all(isinstance(router, (Given, Random)) for _, router in routers):  # one expert, or the mean of all
        shares = [torch.eye(len(router.weight))[state.chosen] for state, router in routers]
        remove_experts(encoder, torch.stack(shares) if isinstance(routers[0][1], Given) else None)
    else:
        for layer in find_layers(encoder):
            first, second = layer.intermediate, layer.output
            if isinstance(first, MoEFFNIntermediate):
                layer.intermediate, layer.output = _FirstHalf(first), _SecondHalf(second)
            elif isinstance(first, MoEIntermediate):
                layer.intermediate = _Intermediate(first)
                if isinstance(second, RoutedOutput):
                    layer.output = dense_half(second)
            elif isinstance(second, MoEOutput):
                layer.output = _Output(second)
            remove_padding_hooks(layer.attention)
        remove_padding_hooks(encoder)
    become_dense(encoder)


class _Weights(nn.Module):
    """The weight of each expert for each token: hidden (B, L, D) to (B, L, N)."""

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.router = router

    def forward(self, hidden: Tensor) -> Tensor:
        router, tokens = self.router, hidden.flatten(0, 1)  # (T, D)
        logits, every = router.score(tokens), torch.arange(len(router.weight))
        if router.top_k == len(router.weight):
            weights = router.weigh(logits, every.expand(tokens.shape[0], -1))
        else:
            experts = router.choose(logits)  # (T, k)
            chosen = experts.unsqueeze(2) == every  # (T, k, N)
            weights = (chosen * router.weigh(logits, experts).unsqueeze(2)).sum(1)
        return weights.to(hidden.dtype).unflatten(0, hidden.shape[:2])


class _Linears(nn.ModuleList):
    """N experts, each a Linear of its own."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        assert isinstance(experts, Experts)
        for weight, bias in zip(experts.weight, experts.bias):
            linear = nn.Linear(1, 1, device="meta")
            linear.weight, linear.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
            self.append(linear)

    def mix(self, inputs: Tensor | list[Tensor], weights: Tensor) -> Tensor:
        """Results (B, L, out), weighted and summed; inputs (B, L, in) are of all experts, or each has its own."""
        each = inputs if isinstance(inputs, list) else [inputs] * len(self)
        terms = [linear(x) * weights[..., n : n + 1] for n, (linear, x) in enumerate(zip(self, each))]
        return sum(terms[1:], terms[0])


class _Intermediate(nn.Module):
    def __init__(self, half: MoEIntermediate) -> None:
        super().__init__()
        self.weights, self.experts = _Weights(half.router), _Linears(half.dense)
        self.activation = half.intermediate_act_fn

    def forward(self, hidden: Tensor) -> Tensor:
        return self.activation(self.experts.mix(hidden, self.weights(hidden)))


class _Output(nn.Module):
    def __init__(self, half: MoEOutput) -> None:
        super().__init__()
        self.weights, self.experts, self.norm = _Weights(half.router), _Linears(half.dense), half.LayerNorm

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        return self.norm(self.experts.mix(hidden, self.weights(hidden)) + residual)


class _FirstHalf(nn.Module):
    """Of whole-FFN experts: activations of each, and the weights that the second half needs."""

    def __init__(self, half: MoEFFNIntermediate) -> None:
        super().__init__()
        self.weights, self.experts = _Weights(half.router), _Linears(half.dense)
        self.activation = half.intermediate_act_fn

    def forward(self, hidden: Tensor) -> tuple[list[Tensor], Tensor]:
        return [self.activation(linear(hidden)) for linear in self.experts], self.weights(hidden)


class _SecondHalf(nn.Module):
    def __init__(self, half: MoEFFNOutput) -> None:
        super().__init__()
        self.experts, self.norm = _Linears(half.dense), half.LayerNorm

    def forward(self, hidden: tuple[list[Tensor], Tensor], residual: Tensor) -> Tensor:
        return self.norm(self.experts.mix(*hidden) + residual)
