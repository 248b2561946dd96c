"""Which examples of a training set are near each other: their queries are one text, or their positives near copies.

Near copies are found by MinHash with bands (A. Broder, "On the resemblance and containment of documents", 1997): of two
texts that share a part J of their pieces of five characters, a value of the MinHash is equal with probability J. A band has
five values, and a text four bands: texts with J = 0.9 have a common band with probability 0.97, with 0.5 with 0.12.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from tqdm.auto import tqdm

from clpl_moe.common.text_key import text_key

if TYPE_CHECKING:
    import datasets

_PIECE, _BANDS, _VALUES = 5, 4, 5
_NUMBERS = np.random.default_rng(0).integers(
    1, 2**63, size=(3, _BANDS * _VALUES + _PIECE), dtype=np.uint64
) | np.uint64(1)


class Marks:
    """For each example some numbers; examples are near each other where they share one."""

    def __init__(self, marks: list[np.ndarray]) -> None:
        self._ends = np.cumsum([0, *map(len, marks)])
        self._marks = np.concatenate(marks) if marks else np.zeros(0, dtype=np.uint64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, example: int) -> set[int]:
        return set(self._marks[self._ends[example] : self._ends[example + 1]].tolist())


@dataclass(frozen=True)
class Together:
    """How far batches are from being distinct."""

    batches: int  # of one epoch
    not_distinct: int  # of these, batches in which two examples are near each other
    most: int  # examples of one set that are all near each other, at most

    def __str__(self) -> str:
        if not self.not_distinct:
            return f"no batch of {self.batches:,} has two examples near each other"
        of_these = f"{self.most:,} examples have one text or near copies of it"
        why = ", more than there are batches" if self.most > self.batches else ""
        return f"{self.not_distinct:,} of {self.batches:,} batches have examples near each other: {of_these}{why}"


def count_together(batches: Sequence[Sequence[int]], marks: Marks) -> Together:
    """What of the batches of an epoch holds examples that are near each other."""
    not_distinct = 0
    for batch in batches:
        of_batch = [marks[example] for example in batch]
        not_distinct += sum(map(len, of_batch)) > len(set[int]().union(*of_batch))
    # Counted only where needed: this takes longer than the batches.
    counts = Counter(mark for example in range(len(marks) if not_distinct else 0) for mark in marks[example])
    return Together(len(batches), not_distinct, max(counts.values(), default=1))


def mark_examples(examples: datasets.Dataset) -> Marks:
    """The marks of all examples, by their queries and all their positives."""
    chosen = examples.select_columns(["query_id", "pos", "pos_ids"])
    marks = []
    for example in tqdm(chosen, "look for near copies", unit="example", delay=2, leave=False):
        ids = np.array([example["query_id"], *example["pos_ids"]]).astype(np.uint64)
        ids[0] ^= np.uint64(1 << 63)  # a query and a passage of one text are no copies
        marks.append(np.concatenate([ids, *map(bands_of, example["pos"])]))
    return Marks(marks)


def bands_of(text: str) -> np.ndarray:
    """The bands of a text, (4,) uint64."""
    letters = np.frombuffer(text_key(text).replace(" ", "").encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    letters = np.pad(letters, (0, max(0, _PIECE - len(letters)))).astype(np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(letters, _PIECE)
    pieces = np.unique((windows * _NUMBERS[0, :_PIECE]).sum(axis=1, dtype=np.uint64))
    factors, summands = _NUMBERS[1, : _BANDS * _VALUES], _NUMBERS[2, : _BANDS * _VALUES]
    mixed = pieces[:, None] * factors + summands
    mixed ^= mixed >> np.uint64(32)
    smallest = (mixed * factors).min(axis=0).reshape(_BANDS, _VALUES)
    return (smallest * _NUMBERS[1, :_VALUES]).sum(axis=1, dtype=np.uint64) + np.arange(_BANDS, dtype=np.uint64)
