"""Exact search for the passages nearest to each query: matrix products in chunks and a running top-k."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from clpl_moe.retrieval.quantize import QuantizedPassages
    from clpl_moe.retrieval.store import EmbeddingShards

_QUERY_BLOCK = 1024


@torch.no_grad()
def search(
    queries: Tensor, passages: Tensor | EmbeddingShards | QuantizedPassages, k: int, *, chunk_size: int = 16384
) -> tuple[Tensor, Tensor]:
    """The ``k`` passages (N, D) of the greatest dot product with each query (Q, D), best first.

    The queries' device computes; passages of any dtype, on any device or disk, are moved there and to float32 a
    chunk at a time. Of equal scores the lower index goes first, also at the cut after ``k``: the result does not depend on
    how ``topk`` breaks ties. Memory beyond the inputs: ``1024 * chunk_size`` scores and the result.

    Returns:
        scores (Q, min(k, N)) float32 and indices (Q, min(k, N)) int64, on the CPU.
    """
    if k < 1 or chunk_size < 1:
        raise ValueError(f"k and chunk_size must be at least 1, found {k} and {chunk_size}")
    if queries.shape[-1] != passages.shape[-1]:
        raise ValueError(f"queries have {queries.shape[-1]} dimensions, passages {passages.shape[-1]}")
    device = queries.device
    blocks = queries.to(torch.float32).split(_QUERY_BLOCK)
    # For each block of queries: scores and indices.
    best = [
        (block.new_empty(len(block), 0), torch.empty(len(block), 0, dtype=torch.int64, device=device))
        for block in blocks
    ]
    for start in range(0, len(passages), chunk_size):
        # First there, then to float32: half the bytes to move, and cast where that is fast.
        chunk = passages[start : start + chunk_size].to(device).to(torch.float32).T  # (D, chunk)
        for number, block in enumerate(blocks):
            scores, columns = _top(block @ chunk, k)  # (block, min(k, chunk))
            # Earlier results have lower indices and stand first: a stable sort keeps this order.
            scores = torch.cat([best[number][0], scores], dim=1)
            indices = torch.cat([best[number][1], columns + start], dim=1)
            scores, order = scores.sort(dim=1, descending=True, stable=True)
            best[number] = scores[:, :k], indices.gather(1, order[:, :k])
    return torch.cat([b[0] for b in best]).cpu(), torch.cat([b[1] for b in best]).cpu()


def _top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Like ``scores.topk(k, dim=1)``, with ties by the lower column: (rows, min(k, columns)) each."""
    k = min(k, scores.shape[1])
    values, columns = scores.topk(k, dim=1)
    columns = columns.sort(dim=1).values
    values, order = scores.gather(1, columns).sort(dim=1, descending=True, stable=True)
    columns = columns.gather(1, order)
    # Where the cut separates equal scores, topk chose any of them: rare, so the slow way.
    cut_tie = (scores >= values[:, -1:]).sum(dim=1) > k
    if cut_tie.any():
        columns[cut_tie] = scores[cut_tie].sort(dim=1, descending=True, stable=True).indices[:, :k]
    return values, columns
