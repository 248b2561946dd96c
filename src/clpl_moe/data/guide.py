"""Negatives that a guide takes for answers, by its scores in the training data (``mine --guide``; GISTEmbed, arXiv:2402.16829)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets

_ROWS_AT_ONCE = 10_000


def rejected(record: Mapping[str, Any], positive: int, margin: float) -> set[int]:
    """Ids of an example's negatives that score above its ``positive``-th positive, less ``margin``."""
    if record["neg_guide_scores"] is None:
        return set()
    ceiling = record["pos_guide_scores"][positive] - margin
    scores = zip(record["neg_ids"], record["neg_guide_scores"], strict=True)
    return {number for number, score in scores if score > ceiling}


def count_rejected(examples: datasets.Dataset, margin: float) -> tuple[int, int]:
    """How many examples have a guide's scores, and how many negatives are left out whichever positive is drawn."""
    scored = count = 0
    columns = examples.select_columns(["pos_guide_scores", "neg_guide_scores"])
    for some in columns.iter(_ROWS_AT_ONCE):
        for positives, negatives in zip(some["pos_guide_scores"], some["neg_guide_scores"]):
            if negatives is not None:
                scored += 1
                count += sum(score > max(positives) - margin for score in negatives)
    return scored, count
