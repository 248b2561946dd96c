"""Scores of a guide: an encoder that judges what another one ranked.

As in GISTEmbed (A. V. Solatorio, arXiv:2402.16829), a passage that the guide finds more similar to the query than the
query's positive is no negative: a judgement that does not depend on the model that is trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from clpl_moe.common.options import refuse_revision_of_folder
from clpl_moe.encoder import Encoder
from clpl_moe.encoder.settings import max_positions
from clpl_moe.mine.index import PassageIndex
from clpl_moe.mine.options import MineArguments
from clpl_moe.mine.rank import MiningQuery
from clpl_moe.retrieval.options import EncodingArguments, open_encoder
from clpl_moe.retrieval.store import EmbeddingShards, encode_passages, encode_queries


class Guide:
    """Cosines of an encoder; embedded are only those passages that are asked for.

    With ``cache`` the embeddings lie in shards there, from which an interrupted run goes on.
    """

    def __init__(
        self, encoder: Encoder, encoding: EncodingArguments, cache: Path | None = None, progress: bool = True
    ) -> None:
        settings = dataclasses.replace(encoder.settings, normalize=True)
        self._encoder = dataclasses.replace(encoder, settings=settings)
        limit = max_positions(encoder.model) or encoding.passage_max_len
        self._encoding = dataclasses.replace(
            encoding,
            query_max_len=min(encoding.query_max_len, limit),
            passage_max_len=min(encoding.passage_max_len, limit),
        )
        self._cache, self._progress = cache, progress

    @classmethod
    def load(cls, arguments: MineArguments, encoding: EncodingArguments, cache: Path) -> Guide:
        """The guide of a command's options: it has its folder's pooling and prompts, unless it is given prompts of its own."""
        assert arguments.guide is not None
        refuse_revision_of_folder(arguments.guide, arguments.guide_revision, "guide_revision")
        encoding = dataclasses.replace(
            encoding,
            query_prompt=arguments.guide_query_prompt,
            passage_prompt=arguments.guide_passage_prompt,
            pooling=None,
            expert=None,
            truncate_dim=None,
        )
        return cls(open_encoder(arguments.guide, encoding, arguments.guide_revision), encoding, cache)

    def read(self, queries: Sequence[MiningQuery], index: PassageIndex, places: Iterable[int]) -> None:
        """Embed the queries, their positives, and the passages at ``places``.

        With ``torch.distributed`` the others have to call :meth:`share` meanwhile.
        """
        wanted = sorted({*places, *(place for query in queries for place in query.positives)})
        self._queries = encode_queries(
            self._encoder, [query.text for query in queries], self._encoding, progress=self._progress
        )
        self._places = np.array(_to_all(wanted), dtype=np.int64)
        self._passages = self._encode(index, self._places)

    def share(self, index: PassageIndex) -> None:
        """Encode this process's part of what the first process reads."""
        self._encode(index, np.array(_to_all(None), dtype=np.int64))

    def _encode(self, index: PassageIndex, places: np.ndarray) -> torch.Tensor | EmbeddingShards:
        texts = index.texts_at(places)
        return encode_passages(self._encoder, texts, self._encoding, cache=self._cache, progress=self._progress)

    def scores(self, row: int, places: Sequence[int]) -> list[float]:
        """The cosines of a query, the ``row``-th that was read, and passages that were read."""
        found = self._passages[np.searchsorted(self._places, places).tolist()]
        return (found @ self._queries[row]).tolist()


def _to_all(places: list[int] | None) -> list[int]:
    """The first process's places, in every process."""
    box = [places]
    if dist.is_initialized():
        dist.broadcast_object_list(box, device=torch.device("cpu"))
    assert box[0] is not None
    return box[0]
