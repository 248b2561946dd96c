"""Routers: which experts each token goes to, and with what weight.

``@register_router("name")`` makes a class known to :class:`~clpl_moe.moe.config.MoEConfig` and so to training. For logits
of N experts, ``p = softmax(logits)`` and the chosen experts C, these come with the package:

- ``straight_through``: ``p[C] / sum(p[C])`` with a denominator that counts as a constant in the backward pass. Its value
  is that of ``topk_softmax`` (1 at ``top_k`` 1, so that the layer computes what the dense one did), but its gradient is
  the probability's, and the router learns at every ``top_k``.
- ``softmax_topk``: ``p[C] · N / top_k``, Switch's rule (arXiv:2101.03961) scaled so that weights sum to 1 while the
  router is undecided. Its first weights are close to 0, which keeps the function at injection.
- ``topk_softmax``: softmax over the chosen logits only. At ``top_k`` 1 the router has no gradient.
- ``random``: no logits; in training one expert drawn for all tokens, in evaluation the experts' mean.
- ``given``: no logits; the expert is given with the text, by its data file.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .dispatch import Assignment, assign
from .layer_state import LayerState, RouterRecord

AnyRouter = TypeVar("AnyRouter", bound="type[Router]")

_ROUTERS: dict[str, type[Router]] = {}


class Router(nn.Module):
    """Scores experts, chooses ``top_k`` of them for each token and weights these. Derive from it for a router of your own.

    A class of your own defines :meth:`weigh`, and overrides :meth:`score` or :meth:`choose` where these differ. For
    injection to keep the encoder's function, a token's weights must sum to 1. The router may hold further parameters;
    they are trained, saved and loaded with ``weight``. A class may promise something of its weights that saves work
    (:attr:`unit_at_top_1`, :attr:`fused_as`); one that states no promise is computed in full.

    ``weight`` (N, in_features) is what :meth:`score` multiplies with.
    """

    weight: Tensor

    unit_at_top_1: ClassVar[bool] = False
    """Promise: where ``top_k`` is 1, all weights are 1 in value. They are then not multiplied; their gradient is kept."""

    fused_as: ClassVar[Literal["straight_through", "constant"] | None] = None
    """Promise: where ``top_k`` is 1, the router does exactly what the fused kernels compute. These take the expert with
    the largest of the logits ``x @ weight.T``, with a weight of 1 whose gradient is the probability's
    (``"straight_through"``) or none (``"constant"``); the methods of the class are not called."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        # A class that overrides a method must not inherit what its parent promised.
        cls.unit_at_top_1 = cls.__dict__.get("unit_at_top_1", False)
        cls.fused_as = cls.__dict__.get("fused_as")

    def __init__(self, in_features: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, in_features))
        self.top_k = top_k

    def reset_parameters(self, std: float) -> None:
        """Draw the first weights, from N(0, std²)."""
        nn.init.normal_(self.weight, std=std)

    def score(self, x: Tensor) -> Tensor:
        """Logits (T, N), in at least float32, of tokens x (T, in_features); called without autocast."""
        return scores(x, self.weight)

    def choose(self, logits: Tensor) -> Tensor:
        """The experts (T, top_k) int64 of each token, all different; not called where ``top_k`` is N."""
        return logits.topk(self.top_k, dim=-1).indices

    def weigh(self, logits: Tensor, experts: Tensor) -> Tensor:
        """Weights (T, top_k), in the logits' dtype and with a graph, of the chosen experts (T, top_k)."""
        raise NotImplementedError(f"{type(self).__name__} does not define weigh(logits, experts)")

    def forward(self, x: Tensor, state: LayerState) -> Assignment:
        """Assign x (T, in_features) to experts; in training, leaves a record in ``state`` where that tracks."""
        num_experts = self.weight.shape[0]
        with torch.autocast(x.device.type, enabled=False):
            logits = self.score(x)
            if self.top_k == num_experts:
                experts = torch.arange(num_experts, device=x.device).expand(len(x), -1)
                counts = torch.full((num_experts,), len(x), device=x.device)
                assignment = Assignment(self.weigh(logits, experts), counts)
            else:
                experts = self.choose(logits)
                unit = self.top_k == 1 and self.unit_at_top_1
                assignment = assign(experts, self.weigh(logits, experts), num_experts, unit=unit)
            self.record(state, logits, assignment.counts)
        return assignment

    def record(self, state: LayerState, logits: Tensor, counts: Tensor) -> None:
        """In training, leave a record of logits (T, N) and of how many tokens went to each expert (N,), where that tracks;
        and in any mode the load, where somebody counts it."""
        if state.loads is not None:
            # Where every token goes to every expert, its weights say how much of it each gets.
            state.loads.append(logits.softmax(-1).sum(0) if self.top_k == len(counts) else counts.float())
        if not (state.tracking and self.training):
            return
        record = RouterRecord(counts.float(), logits.softmax(-1).sum(0), logits.logsumexp(-1).square().sum())
        # What checkpointing repeats has to be computed as before, but is not to be counted twice.
        if state.is_running():
            state.records.append(record)

    def extra_repr(self) -> str:
        experts, features = self.weight.shape
        return f"in_features={features}, num_experts={experts}, top_k={self.top_k}"


def register_router(name: str) -> Callable[[AnyRouter], AnyRouter]:
    """Class decorator: makes a subclass of :class:`Router` known as ``name``, the value of ``router`` in settings.

    A model with such a router loads where its class has been registered before. A name taken by another class raises
    :class:`ValueError`, a class that is no router :class:`TypeError`.
    """

    def register(router: AnyRouter) -> AnyRouter:
        if not (isinstance(router, type) and issubclass(router, Router)):
            raise TypeError(f"{router!r} is no router: derive it from clpl_moe.moe.Router")
        known = _ROUTERS.get(name)
        # The same class may come again, as when a notebook's cell is run twice.
        if known is not None and (known.__module__, known.__qualname__) != (router.__module__, router.__qualname__):
            raise ValueError(f"router {name!r} is {known.__module__}.{known.__qualname__}: choose another name")
        _ROUTERS[name] = router
        return router

    return register


def router_class(name: str) -> type[Router]:
    """The router that is registered as ``name``; raises :class:`ValueError`, with the nearest name, where there is none."""
    if name in _ROUTERS:
        return _ROUTERS[name]
    near = difflib.get_close_matches(str(name), _ROUTERS, 1)
    raise ValueError(
        f"router is {name!r}: choose one of {', '.join(_ROUTERS)}"
        + (f" (did you mean '{near[0]}'?)" if near else "")
        + ", or register your own first (clpl_moe.moe.register_router) and load its models with clpl_moe.load_encoder"
    )


@register_router("straight_through")
class StraightThrough(Router):
    """Probabilities over their sum, which counts as a constant in the backward pass."""

    unit_at_top_1 = True
    fused_as = "straight_through"

    def weigh(self, logits: Tensor, experts: Tensor) -> Tensor:
        if experts.shape == logits.shape:
            return logits.softmax(-1)  # they sum to 1
        chosen = logits.softmax(-1).gather(-1, experts)
        return chosen / chosen.sum(-1, keepdim=True).detach()


@register_router("softmax_topk")
class SoftmaxTopK(Router):
    """Probabilities times N / ``top_k``."""

    def reset_parameters(self, std: float) -> None:
        nn.init.normal_(self.weight, std=std * 1e-6)

    def weigh(self, logits: Tensor, experts: Tensor) -> Tensor:
        return logits.softmax(-1).gather(-1, experts) * (logits.shape[-1] / self.top_k)


@register_router("topk_softmax")
class TopKSoftmax(Router):
    """Softmax of the chosen logits."""

    unit_at_top_1 = True
    fused_as = "constant"

    def weigh(self, logits: Tensor, experts: Tensor) -> Tensor:
        return logits.gather(-1, experts).softmax(-1)


class _Untrained(Router):
    """Scores nothing and learns nothing; each token goes to one expert."""

    def __init__(self, in_features: int, num_experts: int, top_k: int) -> None:
        super().__init__(in_features, num_experts, 1)  # whatever a folder's config says
        del self.weight
        # No parameter, as nothing is trained; a buffer, as every router's file has it.
        self.register_buffer("weight", torch.zeros(num_experts, in_features))

    def reset_parameters(self, std: float) -> None:
        pass


@register_router("given")
class Given(_Untrained):
    """The expert that the data file of a text names; in evaluation the one that :func:`choose_expert` sets, at first 0."""

    def forward(self, x: Tensor, state: LayerState) -> Assignment:
        """Each of x (T, in_features) to the expert that is given for it."""
        ones, given = x.new_ones(len(x), 1), state.get_experts()
        if given is None:
            return Assignment(ones, x.new_zeros(len(self.weight), dtype=torch.int64), alone=state.chosen)
        assignment = assign(given.unsqueeze(1), ones, len(self.weight), unit=True)
        self.record(state, ones.float().new_zeros(len(x), len(self.weight)), assignment.counts)
        return assignment


@register_router("random")
class Random(_Untrained):
    """In training all tokens of a pass go to one expert, drawn anew in each layer; in evaluation to the experts' mean, which
    is the merged layer (AdaMix, arXiv:2205.12410)."""

    def forward(self, x: Tensor, state: LayerState) -> Assignment:
        """All of x (T, in_features) to one expert."""
        logits, counts = x.new_zeros(len(x), len(self.weight)), x.new_zeros(len(self.weight), dtype=torch.int64)
        if not self.training:
            return Assignment(x.new_ones(len(x), 1), counts, alone="mean")
        # With the CPU's generator, as that waits for no device; gradient checkpointing and caching draw again alike.
        expert = int(torch.randint(len(self.weight), ()))
        counts[expert] = len(x)
        self.record(state, logits.float(), counts)
        return Assignment(x.new_ones(len(x), 1), counts, alone=expert)


def scores(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` in at least float32: x (T, in), weight (N, in) to (T, N)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x, weight.to(dtype)) if x.dtype == dtype else _Scores.apply(x, weight, dtype)


class _Scores(torch.autograd.Function):
    """Scores in a wider dtype than that of ``x``, of which no wide copy is kept for the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x.to(dtype) @ weight.to(dtype).t()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight.to(grad.dtype)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (grad.t() @ x.to(grad.dtype)).to(weight.dtype)
        return grad_x, grad_weight, None
