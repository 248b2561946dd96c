"""Router, experts, and the feed-forward modules that use them.

A token's way through a layer with experts:

1. the router scores the experts with a bias-free Linear, in at least float32, and keeps the ``top_k`` best;
2. tokens are sorted by expert, so that each expert computes one matrix product over its own tokens (:mod:`.dispatch`);
3. results are weighted, and summed where ``top_k`` is above 1;
4. what follows and acts on single tokens (activation, output Linear) is computed in the sorted order as far as it goes;
   then results are put back in the tokens' order.

Padding takes no part: it is neither routed nor counted, and the experts' output at its places is zero.

State-dict names: ``router.weight`` (N, in) beside ``dense.weight`` (N, out, in) and ``dense.bias`` (N, out). The
three-dimensional weights stand where a dense model has two-dimensional ones, so that a loader that does not know the
experts stops at the shapes.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .dispatch import (
    Assignment,
    assign,
    cast,
    expert_linear,
    gather,
    mixes_all,
    pick,
    restore,
    routed_gelu,
    routes_in_kernels,
    scores,
)


class LayerState:
    """What a layer's attention and feed-forward modules have to share: which tokens are real, and the record.

    What belongs to a forward pass is kept for each thread by itself, so that threads can share a model. Copies and
    pickles of a model start without it, and without records.
    """

    def __init__(self, tracking: bool = False) -> None:
        self.tracking = tracking  # whether training forwards leave records; off, since records hold on to the graph
        self.records: list[RouterRecord] = []
        self._pass = threading.local()

    # torch.compile takes values of one thread for constants: it has to leave these to Python.

    @torch.compiler.disable
    def get_tokens(self) -> Tensor | None:
        """Indices of the real tokens in the flattened batch; None where all are real."""
        return getattr(self._pass, "tokens", None)

    @torch.compiler.disable
    def set_tokens(self, tokens: Tensor | None) -> None:
        """Set what :meth:`get_tokens` returns in this thread."""
        self._pass.tokens = tokens

    @torch.compiler.disable
    def is_running(self) -> bool:
        """Whether the encoder's own pass is under way, and not what gradient checkpointing repeats of it."""
        return getattr(self._pass, "running", False)

    @torch.compiler.disable
    def set_running(self, running: bool) -> None:
        """Set what :meth:`is_running` returns in this thread."""
        self._pass.running = running

    def __reduce__(self) -> tuple:
        return LayerState, (self.tracking,)


@dataclass
class RouterRecord:
    """What one call of one router leaves for losses and logs; N experts.

    Attributes:
        counts: (N,) float32, assignments to each expert; they sum to tokens times ``top_k``.
        probability_sums: (N,) with a graph, the sum over tokens of each expert's softmax probability.
        z_sum: scalar with a graph, the sum over tokens of the squared log-sum-exp of the logits.
    """

    counts: Tensor
    probability_sums: Tensor
    z_sum: Tensor


class Router(nn.Module):
    """Scores experts and weights the ``top_k`` best of each token.

    The weights of ``p = softmax(logits)`` at the chosen experts C, by kind:

    - ``straight_through``: ``p / sum(p[C])`` with a denominator that counts as a constant in the backward pass. In value
      it is ``topk_softmax`` (1 at ``top_k`` 1, so that the layer computes what the dense one did), but the gradient is
      that of the probability, and the router learns at every ``top_k``.
    - ``softmax_topk``: ``p · N / top_k``, Switch's rule (arXiv:2101.03961) scaled so that weights sum to 1 while the
      router is undecided. Its first weights are close to 0, which keeps the function at injection.
    - ``topk_softmax``: softmax over the chosen logits only. At ``top_k`` 1 the router has no gradient.
    """

    def __init__(self, in_features: int, num_experts: int, top_k: int, kind: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, in_features))
        self.top_k = top_k
        self.kind = kind

    def reset_parameters(self, std: float) -> None:
        """Draw the weights from N(0, std²); for ``softmax_topk`` a thousandth of a thousandth of it."""
        nn.init.normal_(self.weight, std=std * 1e-6 if self.kind == "softmax_topk" else std)

    def extra_repr(self) -> str:
        experts, features = self.weight.shape
        return f"in_features={features}, num_experts={experts}, top_k={self.top_k}, kind={self.kind!r}"

    def forward(self, x: Tensor, state: LayerState) -> Assignment:
        """Assign x (T, in) to experts; in training, leaves a record in ``state`` where that tracks."""
        num_experts = self.weight.shape[0]
        with torch.autocast(x.device.type, enabled=False):
            logits = scores(x, self.weight)  # (T, N)
            if mixes_all(num_experts, self.top_k):
                # All kinds agree where all experts are chosen; nothing has to be sorted.
                counts = torch.full((num_experts,), x.shape[0], device=x.device)
                assignment = Assignment(logits.softmax(-1), counts)
            else:
                chosen_logits, experts = logits.topk(self.top_k, dim=-1)  # (T, k)
                if self.kind == "topk_softmax":
                    weights = chosen_logits.softmax(-1)
                else:
                    chosen = logits.softmax(-1).gather(-1, experts)
                    if self.kind == "straight_through":
                        weights = chosen / chosen.sum(-1, keepdim=True).detach()
                    else:
                        weights = chosen * (num_experts / self.top_k)
                unit = self.top_k == 1 and self.kind != "softmax_topk"
                assignment = assign(experts, weights, num_experts, unit=unit)
            self.record(state, logits, assignment.counts)
        return assignment

    def record(self, state: LayerState, logits: Tensor, counts: Tensor) -> None:
        """In training, leave a record of logits (T, N) and of how many tokens went to each expert (N,), where that tracks."""
        if not (state.tracking and self.training):
            return
        record = RouterRecord(
            counts=counts.float(),
            probability_sums=logits.softmax(-1).sum(0),
            z_sum=logits.logsumexp(-1).square().sum(),
        )
        # What checkpointing repeats has to be computed as before, but is not to be counted twice.
        if state.is_running():
            state.records.append(record)


class Experts(nn.Module):
    """N Linear layers in one parameter: weight (N, out, in), bias (N, out)."""

    def __init__(self, num_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features))

    @classmethod
    def from_linear(cls, linear: nn.Linear, num_experts: int) -> Experts:
        """Copies of ``linear``, in its dtype and on its device (sparse upcycling, arXiv:2212.05055)."""
        experts = cls(0, linear.in_features, linear.out_features)
        experts.weight = nn.Parameter(linear.weight.detach().expand(num_experts, -1, -1).clone())
        experts.bias = nn.Parameter(linear.bias.detach().expand(num_experts, -1).clone())
        return experts

    def merged(self) -> nn.Linear:
        """A Linear with the mean of the experts' weights."""
        _, out_features, in_features = self.weight.shape
        linear = nn.Linear(in_features, out_features, device=self.weight.device, dtype=self.weight.dtype)
        with torch.no_grad():
            linear.weight.copy_(self.weight.mean(0))
            linear.bias.copy_(self.bias.mean(0))
        return linear

    def extra_repr(self) -> str:
        experts, out_features, in_features = self.weight.shape
        return f"num_experts={experts}, in_features={in_features}, out_features={out_features}"

    def forward(self, x: Tensor, assignment: Assignment, weigh: bool = True) -> Tensor:
        """Apply each expert to its part of x; shapes as in :func:`clpl_moe.moe.dispatch.expert_linear`."""
        return expert_linear(x, self.weight, self.bias, assignment, weigh=weigh)


class RoutedTokens:
    """Activations as the experts left them, handed from a layer's intermediate to its output module.

    Attributes:
        values: slots or rows of tokens; without padding and, where sorted, in the experts' order.
        assignment: whose are which.
    """

    def __init__(self, values: Tensor, assignment: Assignment) -> None:
        self.values = values
        self.assignment = assignment


def real_tokens(hidden: Tensor, state: LayerState) -> Tensor:
    """The real tokens (T, D) of hidden (..., D)."""
    flat, real = hidden.reshape(-1, hidden.shape[-1]), state.get_tokens()
    return flat if real is None else pick(flat, real)


def back_in_place(routed: RoutedTokens, state: LayerState, shape: torch.Size) -> Tensor:
    """Rows of weighted results (T, D) where they came from: (*shape, D), zero at padding."""
    flat = restore(routed.values, routed.assignment, state.get_tokens(), shape.numel())
    return flat.view(*shape, flat.shape[-1])


class MoEIntermediate(nn.Module):
    """Takes the place of a layer's ``intermediate``: experts instead of its Linear, then its activation.

    With ``hands_over`` the activations stay sorted and without padding for a :class:`RoutedOutput`; without, the module
    returns what a dense one does.
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
        """(B, L, hidden) to (B, L, ffn)."""
        tokens = real_tokens(hidden, self.state)
        if self._runs_in_kernels(tokens):
            routed = self._route_in_kernels(tokens)
        else:
            assignment = self.router(tokens, self.state)
            mixed = self.dense(gather(tokens, assignment), assignment)
            routed = RoutedTokens(self.intermediate_act_fn(mixed), assignment)
        return routed if self.hands_over else back_in_place(routed, self.state, hidden.shape[:-1])

    def _runs_in_kernels(self, tokens: Tensor) -> bool:
        router, experts = self.router, self.dense
        # An adapter around the experts has to be called, and softmax_topk's weights are not 1.
        plain = type(experts) is Experts and type(router) is Router and router.kind != "softmax_topk"
        return plain and routes_in_kernels(tokens, experts.weight, router.top_k, self.intermediate_act_fn)

    def _route_in_kernels(self, tokens: Tensor) -> RoutedTokens:
        router, experts = self.router, self.dense
        learns = router.kind == "straight_through"
        values, logits, rows, slots, counts = routed_gelu(
            tokens, router.weight, cast(experts.weight), cast(experts.bias), learns=learns
        )
        router.record(self.state, logits, counts)
        weights = logits.new_ones(1).expand(len(rows), 1)
        return RoutedTokens(values, Assignment(weights, counts, rows, slots, unit=True))


class RoutedOutput(nn.Module):
    """Takes the place of a layer's ``output`` behind a :class:`MoEIntermediate`: its own Linear, dropout and layer norm.

    The Linear acts on single tokens, so that they are put back in place only after it.
    """

    def __init__(self, dense: nn.Linear, dropout: nn.Module, norm: nn.Module, state: LayerState) -> None:
        super().__init__()
        self.dense = dense
        self.dropout = dropout
        self.LayerNorm = norm
        self.state = state

    def forward(self, hidden: RoutedTokens, residual: Tensor) -> Tensor:
        """Activations of the tokens and the residual (B, L, hidden) to (B, L, hidden)."""
        results = RoutedTokens(self.dense(hidden.values), hidden.assignment)
        mixed = back_in_place(results, self.state, residual.shape[:-1])
        return self.LayerNorm(self.dropout(mixed) + residual)


class MoEOutput(nn.Module):
    """Takes the place of a layer's ``output``: experts instead of its Linear, then its dropout and layer norm."""

    def __init__(self, router: Router, dense: Experts, dropout: nn.Module, norm: nn.Module, state: LayerState) -> None:
        super().__init__()
        self.router = router
        self.dense = dense
        self.dropout = dropout
        self.LayerNorm = norm
        self.state = state

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """(B, L, ffn) and the residual (B, L, hidden) to (B, L, hidden)."""
        tokens = real_tokens(hidden, self.state)
        assignment = self.router(tokens, self.state)
        results = RoutedTokens(self.dense(gather(tokens, assignment), assignment), assignment)
        mixed = back_in_place(results, self.state, hidden.shape[:-1])
        return self.LayerNorm(self.dropout(mixed) + residual)


class MoEFFNIntermediate(MoEIntermediate):
    """First half of whole-FFN experts: routes once, and leaves the tokens sorted for :class:`MoEFFNOutput`."""

    def forward(self, hidden: Tensor) -> RoutedTokens:
        """(B, L, hidden) to the activations of all slots."""
        tokens = real_tokens(hidden, self.state)
        assignment = self.router(tokens, self.state)
        slots = self.dense(gather(tokens, assignment), assignment, weigh=False)
        return RoutedTokens(self.intermediate_act_fn(slots), assignment)


class MoEFFNOutput(nn.Module):
    """Second half of whole-FFN experts."""

    def __init__(self, dense: Experts, dropout: nn.Module, norm: nn.Module, state: LayerState) -> None:
        super().__init__()
        self.dense = dense
        self.dropout = dropout
        self.LayerNorm = norm
        self.state = state

    def forward(self, hidden: RoutedTokens, residual: Tensor) -> Tensor:
        """Activations of all slots and the residual (B, L, hidden) to (B, L, hidden)."""
        results = RoutedTokens(self.dense(hidden.values, hidden.assignment), hidden.assignment)
        mixed = back_in_place(results, self.state, residual.shape[:-1])
        return self.LayerNorm(self.dropout(mixed) + residual)
