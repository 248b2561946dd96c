"""Lengths of texts in tokens: what a limit cuts off, and limits that fit the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from clpl_moe.data.dataset import CLPLTrainDataset, Example

Count = Callable[[list[str]], list[int]]

_SAMPLE = 256  # examples, with all passages of their groups
_MULTIPLE = 8


def token_counter(tokenizer: PreTrainedTokenizerBase, most: int | None = None) -> Count:
    """A function that counts the tokens of texts, special ones included; no more than ``most``, which is fast for long texts."""
    from clpl_moe.encoder.cut import cut_texts

    limits: dict[str, Any] = {} if most is None else {"truncation": True, "max_length": most}

    def count(texts: list[str]) -> list[int]:
        texts = texts if most is None else cut_texts(tokenizer, texts, most)
        found = tokenizer(texts, return_attention_mask=False, verbose=False, **limits) if texts else {"input_ids": []}
        return list(map(len, found["input_ids"]))

    return count


def sample(dataset: CLPLTrainDataset) -> Iterator[Example]:
    """Examples spread evenly over the data, as the first epoch draws them."""
    return (dataset[(0, index)] for index in range(0, len(dataset), max(1, len(dataset) // _SAMPLE)))


def cut_off(lengths: Sequence[int] | np.ndarray, limit: int) -> tuple[int, int]:
    """How many texts a limit cuts, and how many tokens they lose."""
    over = np.maximum(np.asarray(lengths, dtype=np.int64) - limit, 0)
    return int(np.count_nonzero(over)), int(over.sum())


def fitting(lengths: Sequence[int] | np.ndarray, share: float) -> int:
    """A limit that leaves this share of the texts whole, rounded up to a multiple of 8."""
    length = int(np.quantile(np.asarray(lengths, dtype=np.int64), share, method="higher"))
    return -(-length // _MULTIPLE) * _MULTIPLE


def percent(part: int, whole: int) -> str:
    """A share for people: a small one is not shown as 0%, nor a large one as 100%."""
    if not whole:
        return "0%"
    share = 100 * part / whole
    return f"{share:.0f}%" if share in (0, 100) else f"{min(max(share, 0.1), 99.9):.1f}%"
