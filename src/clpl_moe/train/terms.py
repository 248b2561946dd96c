"""The terms of the loss between two logs: their sums, so that any number of steps takes the memory of one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class TermSums:
    """For each term the weighted sum of its values and the sum of their weights, without reading from the device."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, float]] = {}

    def add(self, terms: dict[str, Tensor], weight: float) -> None:
        """Add the terms of a batch; a batch without a query of its own has none."""
        if not weight:
            return
        for name, value in terms.items():
            total, weights = self._sums.get(name, (None, 0.0))
            wide = torch.float32 if value.device.type == "mps" else torch.float64
            if total is None:
                total = torch.zeros(value.shape, dtype=wide, device=value.device)
            total = total.to(value.device, wide)  # those of a checkpoint are on the CPU
            self._sums[name] = total.add_(value.detach(), alpha=weight), weights + weight

    def plain(self) -> dict[str, tuple[Any, float]]:
        """For each term its sum, as numbers, and the sum of the weights."""
        return {name: (total.tolist(), weights) for name, (total, weights) in self._sums.items()}

    def restore(self, plain: dict[str, tuple[Any, float]]) -> None:
        """Go on from :meth:`plain`."""
        self._sums = {name: (torch.tensor(t, dtype=torch.float64), weights) for name, (t, weights) in plain.items()}

    def clear(self) -> None:
        """Forget everything."""
        self._sums.clear()


def joined(of_processes: list[dict[str, tuple[Any, float]]]) -> dict[str, tuple[Any, float]]:
    """The sums of several processes together. They may have seen different terms: a batch without any negative's query has
    no penalty."""
    found: dict[str, tuple[Any, float]] = {}
    for name in sorted(set().union(*of_processes)):
        parts = [plain[name] for plain in of_processes if name in plain]
        total = torch.tensor([part for part, _ in parts], dtype=torch.float64).sum(0).tolist()
        found[name] = total, sum(weights for _, weights in parts)
    return found
