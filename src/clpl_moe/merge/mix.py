"""Weights between those of a base model and of the model tuned from it.

``(1 - alpha) · base + alpha · tuned`` often keeps what tuning brought and gives back what it took from other tasks (WiSE-FT,
arXiv:2109.01903; LM-Cocktail, arXiv:2311.13534).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from clpl_moe.common.errors import UserError
from clpl_moe.encoder import Encoder
from clpl_moe.encoder.weights import HEAD_FILES, read_head

State = dict[str, Tensor]


def best_alpha(values: Mapping[float, float]) -> float:
    """The share of the tuned weights with the highest value; of equal ones the nearest to the base model."""
    return max(sorted(values), key=lambda alpha: values[alpha])


class Mixer:
    """Sets an encoder's weights to mixtures of its own and of another's.

    Args:
        tuned: dense; its weights are changed by :meth:`mix`.
        base: dense, of the same shapes; more parameters, such as a pooling layer, do not matter.

    Raises:
        UserError: a weight is missing in ``base``, or has another shape.
    """

    def __init__(self, tuned: Encoder, base: Encoder) -> None:
        self.encoder = tuned
        # On the CPU: beside a trainer, a GPU may have no room for weights once more.
        self.tuned = {name: tensor.to("cpu", copy=True) for name, tensor in tuned.model.state_dict().items()}
        self.base = base.model.state_dict()
        _refuse_other_shapes(self.tuned, self.base)
        self._heads = [_read_heads(encoder) for encoder in (base, tuned)]
        for head in self._heads[0].keys() & self._heads[1].keys():
            _refuse_other_shapes(self._heads[1][head], self._heads[0][head])

    def mix(self, alpha: float) -> None:
        """Give the encoder ``(1 - alpha) · base + alpha · tuned``; exactly the one or the other at 0 and 1."""
        for name, tensor in self.encoder.model.state_dict().items():
            tensor.copy_(_mixed(self.base[name], self.tuned[name], alpha))

    def heads(self, alpha: float) -> dict[str, State]:
        """BGE-M3's sparse and multi-vector heads that both models have, mixed, by file name."""
        base, tuned = self._heads
        return {
            file: {name: _mixed(base[file][name], tuned[file][name], alpha) for name in tuned[file]}
            for file in HEAD_FILES
            if file in base and file in tuned
        }


def _mixed(base: Tensor, tuned: Tensor, alpha: float) -> Tensor:
    # lerp gives both ends exactly. What are no floating-point numbers, such as position numbers, is the tuned model's.
    return torch.lerp(base.to(tuned), tuned, alpha) if tuned.is_floating_point() else tuned


def _read_heads(encoder: Encoder) -> dict[str, State]:
    return {file: read_head(path) for file, path in (encoder.head_files or {}).items()}


def _refuse_other_shapes(tuned: State, base: State) -> None:
    for name, tensor in tuned.items():
        found = tuple(base[name].shape) if name in base else "nothing"
        if found != tuple(tensor.shape):
            raise UserError(
                f"base: found {found} for the weights '{name}', expected {tuple(tensor.shape)}: weights are mixed with"
                " those of the model that training began with"
            )
