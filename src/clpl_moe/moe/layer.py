"""The feed-forward modules that a router and experts make up.

1. The router scores the experts, in at least float32, and keeps the ``top_k`` best of each token.
2. Tokens are sorted by expert, so that each expert computes one matrix product over its own tokens (:mod:`.dispatch`).
3. Results are weighted, and summed where ``top_k`` is above 1.
4. Activation and output Linear act on single tokens: they are computed in the sorted order, and then results are put
   back in the tokens' order.

Padding takes no part: it is neither routed nor counted, and the experts' output at its places is zero.

State-dict names: ``router.weight`` (N, in) beside ``dense.weight`` (N, out, in) and ``dense.bias`` (N, out). The
three-dimensional weights stand where a dense model has two-dimensional ones, so that a loader that does not know the
experts stops at the shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .dispatch import Assignment, cast, gather, pick, restore
from .experts import Experts
from .kernel_choice import choose_kernel, routed_gelu
from .layer_state import LayerState
from .router import Router


@dataclass(eq=False)
class RoutedTokens:
    """Activations as the experts left them, handed from a layer's intermediate to its output module."""

    values: Tensor  # slots or rows of tokens, without padding and, where sorted, in the experts' order
    assignment: Assignment


def back_in_place(values: Tensor, assignment: Assignment, state: LayerState, shape: torch.Size) -> Tensor:
    """Rows of weighted results (T, D) where they came from: (*shape, D), zero at padding."""
    return restore(values, assignment, state.get_tokens(), shape.numel()).view(*shape, values.shape[-1])


class MoEIntermediate(nn.Module):
    """Takes the place of a layer's ``intermediate``: experts instead of its Linear, then its activation.

    With ``hands_over`` the activations stay sorted and without padding for a :class:`RoutedOutput`.
    """

    def __init__(
        self, router: Router, dense: Experts, activation: nn.Module, state: LayerState, hands_over: bool = False
    ) -> None:
        super().__init__()
        self.router = router
        self.dense = dense
        self.intermediate_act_fn = activation
        self.state = state
        self.hands_over = hands_over

    def forward(self, hidden: Tensor) -> Tensor | RoutedTokens:
        """(B, L, hidden) to (B, L, ffn), or to the activations of all slots."""
        tokens = pick(hidden, self.state.get_tokens())
        routed = self._fused(tokens) if self._fuses(tokens) else self._route(tokens)
        if self.hands_over:
            return routed
        return back_in_place(routed.values, routed.assignment, self.state, hidden.shape[:-1])

    def _route(self, tokens: Tensor, weigh: bool = True) -> RoutedTokens:
        assignment = self.router(tokens, self.state)
        values = self.dense(gather(tokens, assignment), assignment, weigh=weigh)
        return RoutedTokens(self.intermediate_act_fn(values), assignment)

    def _fuses(self, tokens: Tensor) -> bool:
        router, experts = self.router, self.dense
        # An adapter around the experts or the router has to be called.
        if type(experts) is not Experts or not isinstance(router, Router):
            return False
        options = {"router": router, "activation": self.intermediate_act_fn}
        return choose_kernel(tokens, experts.weight, router.top_k, **options) == "fused"

    def _fused(self, tokens: Tensor) -> RoutedTokens:
        assert routed_gelu is not None
        router, experts = self.router, self.dense
        arguments = tokens, router.weight, cast(experts.weight), cast(experts.bias)
        learns = router.fused_as == "straight_through"
        values, logits, rows, slots, counts = routed_gelu(*arguments, learns=learns)
        router.record(self.state, logits, counts)
        weights = logits.new_ones(1).expand(len(rows), 1)
        return RoutedTokens(values, Assignment(weights, counts, rows, slots, unit=True))


class OutputHalf(nn.Module):
    """What takes the place of a layer's ``output``: a Linear or experts, then the layer's dropout and layer norm.

    Takes (B, L, ffn) or :class:`RoutedTokens`, and the residual (B, L, hidden), to (B, L, hidden).
    """

    def __init__(
        self,
        dense: nn.Linear | Experts,
        dropout: nn.Module,
        norm: nn.LayerNorm,
        state: LayerState,
        router: Router | None = None,
    ) -> None:
        super().__init__()
        if router is not None:
            self.router = router  # first, as optimizers number the parameters in this order
        self.dense = dense
        self.dropout = dropout
        self.LayerNorm = norm
        self.state = state

    def close(self, values: Tensor, assignment: Assignment, residual: Tensor) -> Tensor:
        """Weighted results (T, hidden), put back in place, and the residual (B, L, hidden) to (B, L, hidden)."""
        mixed = back_in_place(values, assignment, self.state, residual.shape[:-1])
        return self.LayerNorm(self.dropout(mixed) + residual)


class RoutedOutput(OutputHalf):
    """Behind a :class:`MoEIntermediate`, with the layer's own Linear."""

    def forward(self, hidden: RoutedTokens, residual: Tensor) -> Tensor:
        return self.close(self.dense(hidden.values), hidden.assignment, residual)


class MoEOutput(OutputHalf):
    """With experts and a router of their own."""

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        tokens = pick(hidden, self.state.get_tokens())
        assignment = self.router(tokens, self.state)
        return self.close(self.dense(gather(tokens, assignment), assignment), assignment, residual)


class MoEFFNIntermediate(MoEIntermediate):
    """First half of whole-FFN experts: leaves all slots to :class:`MoEFFNOutput`, whose experts weigh the results."""

    def forward(self, hidden: Tensor) -> RoutedTokens:
        return self._route(pick(hidden, self.state.get_tokens()), weigh=False)


class MoEFFNOutput(OutputHalf):
    """Second half of whole-FFN experts."""

    def forward(self, hidden: RoutedTokens, residual: Tensor) -> Tensor:
        return self.close(self.dense(hidden.values, hidden.assignment), hidden.assignment, residual)
