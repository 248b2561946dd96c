"""The passages nearest to queries, as a command's options say: exactly, by quantized embeddings or by an approximate index."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from clpl_moe.retrieval.approximate import ApproximateIndex
from clpl_moe.retrieval.quantize import QuantizedPassages
from clpl_moe.retrieval.search import merge, parts, search
from clpl_moe.retrieval.store import Embeddings, process

if TYPE_CHECKING:
    from clpl_moe.retrieval.options import EncodingArguments


def nearest(
    queries: Tensor, passages: Embeddings, k: int, encoding: EncodingArguments, jointly: bool = False
) -> tuple[Tensor, Tensor]:
    """The ``k`` passages nearest to each query, as :func:`clpl_moe.retrieval.search.search` returns them.

    An approximate search prints its recall. ``jointly``: the other processes call :func:`share_search` meanwhile.
    """
    if encoding.index == "approximate":
        index = ApproximateIndex(passages, encoding)
        found = index.search(queries, k)
        print(index, flush=True)
        return found
    if encoding.quantize is not None:
        return QuantizedPassages(passages, encoding.quantize).search(queries, k, encoding.oversampling)
    return search_jointly(queries, passages, k) if jointly else search(queries, passages, k)


def share_search(passages: Embeddings, encoding: EncodingArguments) -> None:
    """What the other processes of ``torchrun`` do while the first one calls :func:`nearest` once: search their part."""
    if encoding.index == "exact" and encoding.quantize is None:
        search_jointly(None, passages, 0)


def search_jointly(queries: Tensor | None, passages: Embeddings, k: int) -> tuple[Tensor, Tensor]:
    """Exact search by all processes of ``torch.distributed``, each in its part of the passages; all have to call this.

    Queries (Q, D) and ``k`` are the first process's, and only it returns the result, which equals one process's
    (:func:`clpl_moe.retrieval.search.search`). Parts are whole chunks, so that the matrix products are the same.
    """
    rank, world = process()
    if world == 1:
        assert queries is not None
        return search(queries, passages, k)
    box = [None if queries is None else (queries.cpu(), queries.device.type, k)]
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    assert box[0] is not None
    asked, device, k = box[0]
    shares = parts(len(passages), world)
    own = search(asked.to(device), passages, k, rows=shares[rank])
    for other in range(1, world):
        if len(shares[other]) == 0 or rank not in (0, other):
            continue
        if rank == other:
            for part in own:
                dist.send(part.contiguous(), 0)
        else:
            shape = len(asked), min(k, len(shares[other]))
            found = torch.empty(shape), torch.empty(shape, dtype=torch.int64)
            for part in found:
                dist.recv(part, other)
            own = merge(own, found, k)
    return own
