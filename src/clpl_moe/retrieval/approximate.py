"""Search in an approximate index of faiss, whose first passages are scored again by the whole embeddings.

1. The corpus is parted into lists around about as many centres as the square root of its passages (IVF). Of each passage the
   index keeps 4 bits for four values (product quantization, FastScan): an eighth of a byte a value, in memory. That is why it
   is faiss: a graph (HNSW) holds whole vectors while it is built, at 100 million passages 200 GB.
2. The index finds candidates by their codes, which are scored again by the whole embeddings.
3. A sample of the queries is searched exactly, too. Passages that this finds and the index does not are missed for one of two
   reasons: their list was not looked at, or their code ranks them too low. Until ``index_recall`` is reached, the number of
   lists or of candidates is doubled, whichever misses more. With all lists and all passages the search is exact, so that
   every recall is reached, whatever the embeddings.

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
_CANDIDATES_AT_ONCE = 2**24  # of all queries together: 0.5 GB


class ApproximateIndex:
    """An index of embeddings (N, D), built or read. ``about`` has figures of the last search, which ``str`` shows."""

    def __init__(self, passages: Embeddings, encoding: EncodingArguments) -> None:
        self.passages, self._encoding = passages, encoding
        self.about: dict[str, Any] = {}
        started = time.perf_counter()
        self.index: Any = _read_or_build(passages) if len(passages) >= _LEAST else None
        self._seconds = time.perf_counter() - started
        self._candidates = 0  # of each query

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
            started = time.perf_counter()
            recall = self._choose(sample, exact, k)
            seconds["choice"] = time.perf_counter() - started
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
            "candidates": len(self.passages) if self.index is None else self._candidates,
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
        }
        return found

    def _choose(self, sample: Tensor, exact: Tensor, k: int) -> float:
        """Set the numbers of lists and of candidates by a sample of the queries (S, D) and what an exact search finds for them
        (S, K); returns the recall."""
        self.index.nprobe, self._candidates = 1, min(len(self.passages), k * self._encoding.oversampling)
        places = self._places(sample, exact)
        while True:
            near = self._find(sample, k)[1]
            shared = [len(np.intersect1d(a, b)) for a, b in zip(near.numpy(), exact.numpy())]
            recall = sum(shared) / exact.numel() if len(sample) else 1.0
            all_lists, all_passages = self.index.nprobe == self.index.nlist, self._candidates == len(self.passages)
            if recall >= self._encoding.index_recall or (all_lists and all_passages):
                return recall
            looked_at = float((places < self.index.nprobe).mean())
            if all_passages or (not all_lists and 1 - looked_at > looked_at - recall):
                self._probe_more()
            else:
                self._candidates = min(2 * self._candidates, len(self.passages))

    def _places(self, sample: Tensor, exact: Tensor) -> np.ndarray:
        """(S, K), the number of lists that are looked at before a passage's own, for passages (S, K) of queries (S, D)."""
        rows, which = exact.unique(return_inverse=True)
        lists = [self.index.quantizer.assign(_float32(self.passages[part.tolist()]), 1) for part in rows.split(4096)]
        near = self.index.quantizer.search(_float32(sample), self.index.nlist)[1]  # (S, lists), nearest first
        return np.take_along_axis(near.argsort(axis=1), np.concatenate(lists).reshape(-1)[which.numpy()], axis=1)

    def _find(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        blocks = queries.split(max(1, _CANDIDATES_AT_ONCE // self._candidates))
        found = [self._find_block(block, k) for block in blocks]
        return torch.cat([scores for scores, _ in found]), torch.cat([rows for _, rows in found])

    def _find_block(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        while True:
            # (Q, C), -1 where lists hold too few
            candidates = torch.from_numpy(self.index.search(_float32(queries), self._candidates)[1])
            enough = (candidates >= 0).sum(dim=1) >= min(k, self._candidates)
            # Each query gets the k passages that it would get from an exact search.
            if self.index.nprobe == self.index.nlist or enough.all():
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
        candidates = f"{about['candidates']:,} candidates"
        recall = f"recall@{about['k']} {about['recall']:.4f}"
        return f"approximate search: {recall} on {measured}; {lists}, {candidates}; {times}"


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
    index.train(_float32(passages[sample.tolist()]))
    for start in range(0, number, _ROWS_AT_ONCE):
        index.add(_float32(passages[start : start + _ROWS_AT_ONCE]))
    if file is not None:
        with atomic_open(file, "wb") as written:
            faiss.write_index(index, faiss.PyCallbackIOWriter(written.write))  # type: ignore[attr-defined]
    return index


def _float32(rows: Tensor) -> np.ndarray:
    """As faiss takes them."""
    return rows.to("cpu", torch.float32).contiguous().numpy()


def _file(passages: Embeddings) -> Path | None:
    """Where an index is kept."""
    if isinstance(passages, EmbeddingRows):
        return passages.shards.folder / f"index-{hashlib.sha256(passages.rows.tobytes()).hexdigest()[:16]}.faiss"
    return passages.folder / "index.faiss" if isinstance(passages, EmbeddingShards) else None
