"""Exact search for the passages nearest to each query: matrix products in chunks and a running top-k."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from clpl_moe.retrieval.quantize import QuantizedPassages
    from clpl_moe.retrieval.store import Embeddings

_QUERY_BLOCK = 1024
_ROWS_AT_ONCE = 4096
CHUNK = 16384  # passages at once


@torch.no_grad()
def search(
    queries: Tensor,
    passages: Embeddings | QuantizedPassages,
    k: int,
    *,
    chunk_size: int | None = None,
    rows: range | None = None,
) -> tuple[Tensor, Tensor]:
    """The ``k`` passages (N, D) of the greatest dot product with each query (Q, D), best first.

    The queries' device computes; passages of any dtype, on any device or disk, are moved there and to float32 a
    chunk at a time. Of equal scores the lower index goes first, also at the cut after ``k``: the result does not depend on
    how ``topk`` breaks ties. Memory beyond the inputs: ``1024 * chunk_size`` scores and the result. ``rows`` are the only
    ones that are searched; not given: all.

    Returns:
        scores (Q, min(k, N)) float32 and indices (Q, min(k, N)) int64, on the CPU.
    """
    chunk_size = CHUNK if chunk_size is None else chunk_size
    rows = range(len(passages)) if rows is None else rows
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
    for start in range(rows.start, rows.stop, chunk_size):
        # First there, then to float32: half the bytes to move, and cast where that is fast.
        chunk = passages[start : min(start + chunk_size, rows.stop)].to(device).to(torch.float32).T  # (D, chunk)
        for number, block in enumerate(blocks):
            scores, columns = _better(block @ chunk, k, best[number][0])
            best[number] = merge(best[number], (scores, columns + start), k)
    return torch.cat([b[0] for b in best]).cpu(), torch.cat([b[1] for b in best]).cpu()


def parts(length: int, count: int) -> list[range]:
    """The rows of a corpus in parts of whole chunks, so that a search of a part has the matrix products of a whole search."""
    chunks = -(-length // CHUNK)
    cuts = [min(length, CHUNK * (chunks * number // count)) for number in range(count + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(cuts)]


def merge(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` best of two results, scores and indices (Q, …) each; the indices of the second are higher."""
    scores, order = torch.cat([first[0], second[0]], dim=1).sort(dim=1, descending=True, stable=True)
    return scores[:, :k], torch.cat([first[1], second[1]], dim=1).gather(1, order[:, :k])


def rescore(queries: Tensor, passages: Embeddings, candidates: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` best of each query's candidates (Q, C), by the dot products of queries (Q, D) and whole embeddings, which are
    read in the order of the corpus. Of equal scores the lower index goes first; -1 is no candidate."""
    candidates = candidates.sort(dim=1).values
    queries = queries.to("cpu", torch.float32)
    scores = torch.empty(candidates.numel())
    flat = candidates.flatten()
    for part in flat.argsort().split(_ROWS_AT_ONCE):
        places, which = flat[part].clamp(min=0).unique(return_inverse=True)
        found = passages[places.tolist()].to("cpu", torch.float32)[which]  # (part, D)
        scores[part] = (found * queries[part // candidates.shape[1]]).sum(dim=1)
    scores = scores.view(candidates.shape).masked_fill(candidates < 0, -torch.inf)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return scores[:, :k], candidates.gather(1, order[:, :k])


def _better(scores: Tensor, k: int, best: Tensor) -> tuple[Tensor, Tensor]:
    """Of scores (rows, columns) those that belong to the ``k`` best together with the best so far (rows, up to k): their
    values and columns, with minus infinity behind them."""
    if scores.device.type != "cpu" or best.shape[1] < k:
        return _top(scores, k)
    # After some chunks few scores are better, and to look for these takes half the time of topk.
    rows, columns = (scores > best[:, -1:]).nonzero(as_tuple=True)
    counts = rows.bincount(minlength=len(scores))
    most = int(counts.max())
    if most > k:
        return _top(scores, k)
    places = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
    values, chosen = scores.new_full((len(scores), most), -torch.inf), columns.new_zeros(len(scores), most)
    values[rows, places], chosen[rows, places] = scores[rows, columns], columns
    return values, chosen


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
