"""Search on embeddings of 8 bits or 1 bit a value, whose first passages are scored again by the whole embeddings.

1. The embeddings of the corpus become codes, which lie in memory: a quarter or a thirty-second of their size in float32. With
   ``int8`` the range of each dimension over the corpus has 256 steps, with ``binary`` a value is above 0 or not. The codes are
   those of sentence-transformers' ``quantize_embeddings``, and so of the stores that are filled by it.
2. Queries stay in float32. Their dot products with the codes rank the corpus: to decode a code, its step is multiplied, which
   the query does beforehand, and an offset added, which is the same for all passages of a query.
3. ``oversampling`` times as many passages as asked for are scored again, exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from clpl_moe.retrieval.search import rescore, search

if TYPE_CHECKING:
    from clpl_moe.retrieval.options import Quantization
    from clpl_moe.retrieval.store import Embeddings

_ROWS_AT_ONCE = 4096


class QuantizedPassages:
    """The codes of embeddings (N, D) in memory or on disk, which stay where they are.

    ``quantized[start:stop]`` are codes (stop - start, D), int8, or uint8 of 0 and 1; ``codes`` holds them, packed.
    """

    def __init__(self, passages: Embeddings, kind: Quantization) -> None:
        from sentence_transformers import quantize_embeddings

        self.passages, self.shape = passages, passages.shape
        number, dimensions = self.shape
        self.steps = torch.ones(dimensions)  # (D,), what a query is multiplied with
        self.codes: np.ndarray
        ranges = None
        if kind == "int8":
            ranges = _ranges(passages)
            steps = torch.from_numpy((ranges[1] - ranges[0]) / 255)
            self.steps = torch.where(steps == 0, 1, steps)
            self.codes = np.empty((number, dimensions), np.int8)
        else:
            self.codes = np.empty((number, (dimensions + 7) // 8), np.uint8)
        for start, rows in _blocks(passages):
            # In sentence-transformers before 6, bits of several rows share a byte where dimensions are no multiple of 8.
            codes = np.packbits(rows > 0, axis=1) if ranges is None else quantize_embeddings(rows, "int8", ranges)
            self.codes[start : start + len(rows)] = codes

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Tensor:
        codes = self.codes[rows]
        if codes.dtype == np.uint8:
            codes = np.unpackbits(codes, axis=1, count=self.shape[1])
        return torch.from_numpy(codes)

    def search(self, queries: Tensor, k: int, oversampling: int) -> tuple[Tensor, Tensor]:
        """As :func:`clpl_moe.retrieval.search.search` of the whole embeddings, but for passages that are not among the first
        ``k * oversampling`` by their codes."""
        steps = self.steps.to(queries.device)
        candidates = search(queries.to(torch.float32) * steps, self, k * oversampling)[1]  # (Q, C)
        return rescore(queries, self.passages, candidates, k)


def _blocks(passages: Embeddings) -> Iterator[tuple[int, np.ndarray]]:
    """Rows in float32, and where they begin."""
    for start in range(0, len(passages), _ROWS_AT_ONCE):
        yield start, passages[start : start + _ROWS_AT_ONCE].to("cpu", torch.float32).numpy()


def _ranges(passages: Embeddings) -> np.ndarray:
    """(2, D) float32, the least and the greatest value of each dimension."""
    least, most = np.full((2, passages.shape[1]), [[np.inf], [-np.inf]], np.float32)
    for _, rows in _blocks(passages):
        least, most = np.minimum(least, rows.min(axis=0)), np.maximum(most, rows.max(axis=0))
    return np.stack([least, most])
