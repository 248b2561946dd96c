"""Options of the loss, stated once for everything that takes them."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal, get_args

from clpl_moe.common.options import option

Penalty = Literal["cosine", "contrastive"]


@dataclass(eq=False)
class LossTermOptions:
    """Options that training has under these names too: its options are a subclass."""

    temperature: float = option("Divides the similarities in the contrastive term.", 0.02)
    penalty_weight: float = option("λ: the penalty's share of the loss; 0 is the plain contrastive loss.", 0.1)
    _: KW_ONLY
    penalty: Penalty = option(
        "The penalty: distance of negatives from their queries, as published, or contrastive: these queries have"
        " to find the negatives among the step's passages.",
        "cosine",
    )
    symmetric_weight: float = option("Weight of the term in which each positive has to find its query; 0: none.", 0.0)
    in_batch_negatives: bool = option("Whether other queries' passages are negatives too.", True)
    false_negative_margin: float | None = option(
        "Leave out negatives more similar to the query than its positive by over this margin.", None
    )


@dataclass(eq=False)
class CLPLOptions(LossTermOptions):
    """All options of :class:`~clpl_moe.loss.CLPLLoss`, which explains them; wrong ones raise :class:`ValueError`."""

    normalize: bool = field(default=True, kw_only=True)
    gather_across_devices: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if not (_is_number(self.temperature) and 0 < self.temperature < math.inf):
            raise ValueError(f"temperature is {self.temperature}: choose a number above 0, such as 0.02")
        if not (_is_number(self.penalty_weight) and 0 <= self.penalty_weight <= 1):
            raise ValueError(f"penalty_weight is {self.penalty_weight}: choose a number from 0 to 1")
        if self.penalty not in get_args(Penalty):
            raise ValueError(f"penalty is {self.penalty!r}: choose one of {', '.join(get_args(Penalty))}")
        if not (_is_number(self.symmetric_weight) and 0 <= self.symmetric_weight < math.inf):
            raise ValueError(f"symmetric_weight is {self.symmetric_weight}: choose a finite number, 0 or above")
        if self.false_negative_margin is not None and not math.isfinite(self.false_negative_margin):
            raise ValueError(f"false_negative_margin is {self.false_negative_margin}: choose a finite number, or None")
        if self.gather_across_devices and not self.in_batch_negatives:
            raise ValueError("gather_across_devices needs the batch's own negatives too: set in_batch_negatives=True")
        self.temperature = float(self.temperature)
        self.penalty_weight = float(self.penalty_weight)
        self.symmetric_weight = float(self.symmetric_weight)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))
