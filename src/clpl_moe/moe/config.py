"""The settings of experts: how many, where, and how tokens reach them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

_MOST_EXPERTS = 1024
TARGETS = ("intermediate", "output", "ffn")


@dataclass
class MoEConfig:
    """Settings of the mixture of experts in an encoder's feed-forward layers; wrong ones raise :class:`ValueError`."""

    num_experts: int = field(default=2, metadata={"help": "experts per layer, each a copy of the dense layer"})
    top_k: int = field(default=1, metadata={"help": "experts that each token goes to"})
    target: str = field(
        default="intermediate",
        metadata={
            "help": "what becomes experts: the layer's intermediate Linear, its output Linear, or the whole ffn",
            "choices": list(TARGETS),
        },
    )
    layers: str | list[int] = field(
        default="all", metadata={"help": "layers with experts: all, every:2 (counted from the last), or numbers"}
    )
    router: str = field(
        default="straight_through",
        metadata={
            "help": "how experts are weighted: straight_through learns at every top_k; softmax_topk is Switch's rule,"
            " scaled; topk_softmax is the rule of the 2024 checkpoints, whose router does not learn at top_k 1; random"
            " draws in training; given takes the expert that comes with the text; or the name of a router of your own"
            " (clpl_moe.moe.register_router)",
        },
    )
    router_init_std: float = field(default=0.02, metadata={"help": "standard deviation of the router's first weights"})
    expert: int = field(default=0, metadata={"help": "with router given: the expert of texts that have none given"})

    def __post_init__(self) -> None:
        for name in ("num_experts", "top_k"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= _MOST_EXPERTS:
                raise ValueError(
                    f"{name} is {value!r}: choose a whole number of at least 1, and at most {_MOST_EXPERTS}"
                )
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k is {self.top_k} but there are {self.num_experts} experts: lower it or add experts")
        if type(self.expert) is not int or not 0 <= self.expert < self.num_experts:
            raise ValueError(f"expert is {self.expert!r}: choose a number from 0 to {self.num_experts - 1}")
        if self.target not in TARGETS:
            raise ValueError(f"target is {self.target!r}: choose one of {', '.join(TARGETS)}")
        from .router import router_class  # needs torch, which settings do without until some are made

        router_class(self.router)
        std = self.router_init_std
        if not isinstance(std, (int, float)) or not (math.isfinite(std) and std >= 0):
            raise ValueError(f"router_init_std is {std!r}: choose a number of at least 0")
        self.resolve_layers(10_000)

    def resolve_layers(self, num_layers: int) -> list[int]:
        """Indices of the layers that get experts, in an encoder of ``num_layers``; raises :class:`ValueError`."""
        chosen = self.layers
        if chosen == "all":
            return list(range(num_layers))
        if isinstance(chosen, str):
            every, step = chosen.startswith("every:"), chosen.removeprefix("every:")
            if every and step.isdigit() and int(step) > 0:
                # From the last layer down: sparse upcycling (arXiv:2212.05055) converts the last layers first.
                return sorted(range(num_layers - 1, -1, -int(step)))
            chosen = [int(part) if part.strip().isdigit() else -1 for part in chosen.split(",")]
        if not isinstance(chosen, (list, tuple)) or not chosen or not all(type(i) is int and i >= 0 for i in chosen):
            raise ValueError(f"layers is {self.layers!r}: choose 'all', 'every:2' or layer numbers such as 8,9,10,11")
        if max(chosen) >= num_layers:
            raise ValueError(f"layers names layer {max(chosen)}, but the encoder's layers are 0 to {num_layers - 1}")
        return sorted(set(chosen))

    def to_dict(self) -> dict[str, Any]:
        """As in a model folder's ``config.json``; ``expert`` only where it is set, as in folders made before."""
        return {name: value for name, value in asdict(self).items() if name != "expert" or value}
