"""Options of the loss, stated once for everything that takes them."""

from __future__ import annotations

import logging
import math
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Literal, get_args

from clpl_moe.common.options import option

logger = logging.getLogger(__name__)

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
    penalty_temperature: float | None = option(
        "Divides the similarities in the penalty; not given: the cosine penalty is not divided, the contrastive one has"
        " the temperature. Measured with the cosine penalty: retrieval became worse than the base model's.",
        None,
    )
    equal_weights: bool = option(
        "Each query of a negative weighs as much as the batch's own queries, in place of penalty_weight.", False
    )
    symmetric_weight: float = option("Weight of the term in which each positive has to find its query; 0: none.", 0.0)
    in_batch_negatives: bool = option("Whether other queries' passages are negatives too.", True)
    same_tower_negatives: bool = option(
        "Whether other queries are negatives of the query, and other queries' passages of the positive.", False
    )
    hardness_weight: float = option(
        "β: each negative weighs exp(β · its similarity) in the softmax; 0: all weigh the same.", 0.0
    )
    false_negative_margin: float | None = option(
        "Leave out negatives more similar to the query than its positive by over this margin.", None
    )
    matryoshka_dims: list[int] | None = option(
        "Matryoshka: the loss is the sum of the losses of the embeddings' first so many dimensions, for each of these numbers,"
        " such as 1024 512 256 128 64, so that embeddings may be truncated to them; not given: the whole embeddings only.",
        None,
        least=1,
        most=1_048_576,
    )
    matryoshka_weights: list[float] | None = option(
        "The weight of each of matryoshka_dims in the sum; not given: 1 each.", None, least=0, most=1_000_000
    )

    def check_dimensions(self, dimensions: int) -> None:
        """Raise :class:`ValueError` where ``matryoshka_dims`` are more than a model's embeddings have, and warn where these
        are not among them."""
        if not self.matryoshka_dims:
            return
        if (most := max(self.matryoshka_dims)) > dimensions:
            raise ValueError(
                f"matryoshka_dims: found {most}, expected at most {dimensions}, the embeddings' dimensions"
            )
        if most < dimensions:
            logger.warning(
                "matryoshka_dims has %s at most, and the embeddings %s dimensions: whole embeddings are not trained, and"
                " should be truncated wherever they are used",
                most,
                dimensions,
            )

    def weights_of_dimensions(self, whole: int) -> dict[int, float]:
        """The weight of each number of dimensions; without ``matryoshka_dims`` 1 for the ``whole``."""
        dims = self.matryoshka_dims or [whole]
        return dict(zip(dims, self.matryoshka_weights or [1.0] * len(dims), strict=True))

    def in_words(self) -> str:
        """The loss in one line: temperature, penalty, in-batch negatives, and what else differs from its default."""
        weight = "equal weights" if self.equal_weights else f"penalty weight {self.penalty_weight}"
        negatives = "on" if self.in_batch_negatives else "off"
        parts = [f"temperature {self.temperature}", f"{weight} ({self.penalty})", f"in-batch negatives {negatives}"]
        said = ("temperature", "penalty_weight", "equal_weights", "penalty", "in_batch_negatives")
        for option_ in fields(LossTermOptions):
            value = getattr(self, option_.name)
            if option_.name not in said and value != option_.default:
                shown = " ".join(map(str, value)) if isinstance(value, list) else "on" if value is True else value
                parts.append(f"{option_.name.replace('_', ' ')} {shown}")
        return ", ".join(parts)


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
        scale = self.penalty_temperature
        if scale is not None and not (_is_number(scale) and 0 < scale < math.inf):
            raise ValueError(f"penalty_temperature is {scale}: choose a number above 0, such as temperature's, or None")
        for name in ("symmetric_weight", "hardness_weight"):
            if not (_is_number(value := getattr(self, name)) and 0 <= value < math.inf):
                raise ValueError(f"{name} is {value}: choose a finite number, 0 or above")
        if self.false_negative_margin is not None and not math.isfinite(self.false_negative_margin):
            raise ValueError(f"false_negative_margin is {self.false_negative_margin}: choose a finite number, or None")
        if self.gather_across_devices and not self.in_batch_negatives:
            raise ValueError("gather_across_devices needs the batch's own negatives too: set in_batch_negatives=True")
        if self.same_tower_negatives and not self.in_batch_negatives:
            raise ValueError("same_tower_negatives are texts of the batch's other queries: set in_batch_negatives=True")
        self._check_matryoshka()
        self.temperature = float(self.temperature)
        self.penalty_weight = float(self.penalty_weight)
        self.symmetric_weight = float(self.symmetric_weight)
        self.hardness_weight = float(self.hardness_weight)

    def _check_matryoshka(self) -> None:
        dims, weights = self.matryoshka_dims, self.matryoshka_weights
        if dims is None:
            if weights is not None:
                raise ValueError("matryoshka_weights belong to matryoshka_dims: give both, or neither")
            return
        if not dims or len(set(dims)) < len(dims) or not all(type(dim) is int and dim > 0 for dim in dims):
            raise ValueError(
                f"matryoshka_dims is {list(dims)}: choose numbers of dimensions, each once, such as 1024, 256"
            )
        self.matryoshka_dims = list(dims)
        if weights is None:
            return
        if len(weights) != len(dims):
            raise ValueError(
                f"matryoshka_weights has {len(weights)}: choose one for each of the {len(dims)} dimensions"
            )
        if not all(_is_number(weight) and 0 <= weight < math.inf for weight in weights) or not any(weights):
            raise ValueError(
                f"matryoshka_weights is {list(weights)}: choose finite numbers, 0 or above, and not only 0"
            )
        self.matryoshka_weights = [float(weight) for weight in weights]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))
