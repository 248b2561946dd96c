"""The passages of a corpus ranked by their similarity to queries."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from clpl_moe.encoder import Encoder
from clpl_moe.mine.index import PassageIndex
from clpl_moe.retrieval.nearest import nearest, share_search
from clpl_moe.retrieval.options import EncodingArguments
from clpl_moe.retrieval.store import EmbeddingRows, Embeddings, EmbeddingShards, encode_passages, encode_queries

Candidate = tuple[int, float]  # place in the index, score

# A query that more passages answer may find fewer negatives than asked for. Without a bound it would deepen the search,
# and the memory that this takes, for all.
_MOST_EXCLUDED = 1000
_ROWS_AT_ONCE = 4096


@dataclass
class MiningQuery:
    """A query that wants negatives."""

    key: str  # seeds its draws, so that other queries do not matter
    text: str  # without prompt
    positives: list[int]  # places in the index
    excluded: set[int]  # places of all passages known to answer it, its positives among them
    other_positives: list[str] = field(default_factory=list)  # texts that the corpus does not hold

    def positive_texts(self, index: PassageIndex) -> list[str]:
        """Texts of all its positives."""
        return [*(index.texts[place] for place in self.positives), *self.other_positives]


@dataclass
class Ranking:
    """Passages by similarity to each of Q queries."""

    scores: torch.Tensor  # (Q, K) float32, best first
    places: torch.Tensor  # (Q, K) int64, in the index
    positive_scores: list[list[float]]  # of each query's positives, then of its other positives


def encode_index(
    index: PassageIndex, encoder: Encoder, encoding: EncodingArguments, cache: Path | None, progress: bool = True
) -> Embeddings:
    """The embeddings of an index's texts, by place. In a folder that the user named they are rows of the whole corpus, whose
    embeddings ``encode`` and ``evaluate`` write and read, too."""
    encoder = dataclasses.replace(encoder, settings=dataclasses.replace(encoder.settings, normalize=True))
    if cache is None or encoding.cache_dir is None:
        return encode_passages(encoder, index.texts, encoding, cache=cache, progress=progress)
    corpus = encode_passages(encoder, index.corpus, encoding, cache=cache, progress=progress)
    assert isinstance(corpus, EmbeddingShards)
    return EmbeddingRows(corpus, index.rows)


def share_ranking(index: PassageIndex, encoder: Encoder, encoding: EncodingArguments, cache: Path) -> None:
    """What the other processes of ``torchrun`` do while the first one ranks: encode and search their part."""
    share_search(encode_index(index, encoder, encoding, cache, progress=False), encoding)


def rank_passages(
    queries: Sequence[MiningQuery],
    index: PassageIndex,
    rank_to: int,
    encoder: Encoder,
    encoding: EncodingArguments,
    cache: Path | None = None,
    progress: bool = True,
    jointly: bool = False,
) -> Ranking:
    """The passages most similar to each query, ``rank_to`` of them besides those that have no rank. ``jointly``: the other
    processes call :func:`share_ranking` meanwhile."""

    encoder = dataclasses.replace(encoder, settings=dataclasses.replace(encoder.settings, normalize=True))
    query_embeddings = encode_queries(encoder, [query.text for query in queries], encoding, progress=progress)
    others = [text for query in queries for text in query.other_positives]
    other_embeddings = encode_passages(encoder, others, encoding, progress=progress) if others else None
    passages = encode_index(index, encoder, encoding, cache, progress)
    # Deep enough that the window is full when all that must not be in it has been taken out.
    depth = rank_to + min(_MOST_EXCLUDED, max(len(query.excluded) for query in queries))
    scores, places = nearest(query_embeddings.to(encoder.model.device), passages, depth, encoding, jointly)
    pairs = [(row, place) for row, query in enumerate(queries) for place in query.positives]
    positive_scores: list[list[float]] = [[] for _ in queries]
    for start in range(0, len(pairs), _ROWS_AT_ONCE):
        rows, wanted = zip(*pairs[start : start + _ROWS_AT_ONCE])
        products = (passages[list(wanted)] * query_embeddings[list(rows)]).sum(dim=1)
        for row, score in zip(rows, products.tolist()):
            positive_scores[row].append(score)
    at = 0
    for row, query in enumerate(queries):
        if other_embeddings is not None and (number := len(query.other_positives)):
            positive_scores[row] += (other_embeddings[at : at + number] @ query_embeddings[row]).tolist()
            at += number
    return Ranking(scores, places, positive_scores)
