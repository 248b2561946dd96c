"""Search in an approximate index of faiss, whose first passages are scored again by the whole embeddings.

1. The corpus is parted into lists around about as many centres as the square root of its passages (IVF). Of each passage the
   index keeps 4 bits for four values (product quantization, FastScan): an eighth of a byte a value, in memory. That is why it
   is faiss: a graph (HNSW) holds whole vectors while it is built, at 100 million passages 200 GB.
2. A sample of the queries is searched exactly, too. Twice as many lists are looked at until ``index_recall`` of what the exact
   search finds is found.
3. ``oversampling`` times as many passages as asked for are scored again, exactly.

Beside embeddings on disk the index lies in their folder, where later calls find it.
"""

from __future__ import annotations

import hashlib
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from clpl_moe.common.files import atomic_open
from clpl_moe.retrieval.search import rescore, search
from clpl_moe.retrieval.store import EmbeddingRows, Embeddings, EmbeddingShards

if TYPE_CHECKING:
    from clpl_moe.retrieval.options import EncodingArguments

_LEAST = 1000  # passages; fewer do not train an index
_SAMPLE = 200  # queries
_TRAINED_ON = 40  # passages for each list
_ROWS_AT_ONCE = 65536


class ApproximateIndex:
    """An index of embeddings (N, D), built or read. ``about`` has figures of the last search, which ``str`` shows."""

    def __init__(self, passages: Embeddings, encoding: EncodingArguments) -> None:
        self.passages, self._encoding = passages, encoding
        self.about: dict[str, Any] = {}
        started = time.perf_counter()
        self.index: Any = _read_or_build(passages) if len(passages) >= _LEAST else None
        self._seconds = time.perf_counter() - started

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """As :func:`clpl_moe.retrieval.search.search`, but for passages that the index does not find."""
        sample = queries[np.unique(np.linspace(0, len(queries) - 1, min(_SAMPLE, len(queries))).astype(np.int64))]
        started = time.perf_counter()
        exact = search(sample, self.passages, k)[1]  # (S, K)
        seconds = {"index": self._seconds, "exact": time.perf_counter() - started}
        recall = 1.0
        if self.index is None:
            found = search(queries, self.passages, k)
        else:
            self.index.nprobe = 1
            while True:
                near = self._find(sample, k)[1]
                shared = [len(np.intersect1d(a, b)) for a, b in zip(near.numpy(), exact.numpy())]
                recall = sum(shared) / max(1, exact.numel())
                if recall >= self._encoding.index_recall or self.index.nprobe == self.index.nlist:
                    break
                self._probe_more()
            started = time.perf_counter()
            found = self._find(queries, k)
            seconds["search"] = time.perf_counter() - started
        seconds["exact"] *= len(queries) / max(1, len(sample))  # of all queries, about
        self.about = {
            "recall": recall,
            "k": exact.shape[1],
            "sample": len(sample),
            "queries": len(queries),
            "lists": 1 if self.index is None else self.index.nlist,
            "lists_searched": 1 if self.index is None else self.index.nprobe,
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
        }
        return found

    def _find(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        count = min(len(self.passages), k * self._encoding.oversampling)
        while True:
            asked = queries.to("cpu", torch.float32).contiguous().numpy()
            candidates = torch.from_numpy(self.index.search(asked, count)[1])  # (Q, C), -1 where lists hold too few
            # Each query gets the k passages that it would get from an exact search.
            if self.index.nprobe == self.index.nlist or ((candidates >= 0).sum(dim=1) >= min(k, count)).all():
                return rescore(queries, self.passages, candidates, k)
            self._probe_more()

    def _probe_more(self) -> None:
        self.index.nprobe = min(2 * self.index.nprobe, self.index.nlist)

    def __str__(self) -> str:
        about, seconds = self.about, self.about["seconds"]
        if self.index is None:
            return f"exact search: fewer than {_LEAST:,} passages need no index"
        measured = f"{about['sample']:,} of {about['queries']:,} queries"
        times = (
            f"index {seconds['index']:.1f} s, search {seconds['search']:.1f} s (exact about {seconds['exact']:.1f} s)"
        )
        lists = f"{about['lists_searched']:,} of {about['lists']:,} lists"
        return f"approximate search: recall@{about['k']} {about['recall']:.4f} on {measured}; {lists}; {times}"


def _read_or_build(passages: Embeddings) -> Any:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    if (file := _file(passages)) is not None and file.exists():
        try:
            return faiss.read_index(str(file))
        except RuntimeError:  # damaged
            file.unlink(missing_ok=True)
    number, dimensions = passages.shape
    lists = min(math.isqrt(number), number // _TRAINED_ON)
    codes = next(dimensions // width for width in (4, 2, 1) if dimensions % width == 0)
    index = faiss.index_factory(dimensions, f"IVF{lists},PQ{codes}x4fs", faiss.METRIC_INNER_PRODUCT)
    sample = np.linspace(0, number - 1, min(number, lists * _TRAINED_ON)).astype(np.int64)
    index.train(passages[sample.tolist()].to("cpu", torch.float32).numpy())
    for start in range(0, number, _ROWS_AT_ONCE):
        index.add(passages[start : start + _ROWS_AT_ONCE].to("cpu", torch.float32).numpy())
    if file is not None:
        with atomic_open(file, "wb") as written:
            faiss.write_index(index, faiss.PyCallbackIOWriter(written.write))  # type: ignore[attr-defined]
    return index


def _file(passages: Embeddings) -> Path | None:
    """Where an index is kept."""
    if isinstance(passages, EmbeddingRows):
        return passages.shards.folder / f"index-{hashlib.sha256(passages.rows.tobytes()).hexdigest()[:16]}.faiss"
    return passages.folder / "index.faiss" if isinstance(passages, EmbeddingShards) else None
