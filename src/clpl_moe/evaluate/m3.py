"""Sparse and multi-vector scores of BGE-M3 models over the passages that the dense embeddings found, alone and summed.

As in the M3 report (Chen et al. 2024, arXiv:2402.03216, sections 3.2 and 4.1):

1. ``sparse``: a token's weight is relu(sparse_linear(state)); a vocabulary entry has the greatest weight of its tokens,
   special tokens have none. The score is the sum of the products of both texts' weights, over the entries that they share.
2. ``multi-vec``: each token but the first has a vector, colbert_linear(state) scaled to length 1. The score is the mean, over
   the query's vectors, of the greatest dot product with a vector of the passage (late interaction).
3. ``dense+sparse`` and ``all``: weighted means, by default with the report's weights on MIRACL, 1 (dense), 0.3 (sparse), 1
   (multi-vec). The report sums; a mean gives the same ranking.

Unlike in the report, all scores rank the candidates of dense retrieval. For each block of queries a candidate is encoded
once, in batches, and scored against all queries that have it: memory holds the vectors of one block and of one batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from clpl_moe.common.errors import UserError, at
from clpl_moe.encoder.encode import batches, default_batch_tokens, refuse_too_large, tokenize
from clpl_moe.encoder.precision import autocast, onednn_linear
from clpl_moe.encoder.settings import pool
from clpl_moe.encoder.weights import HEAD_FILES, find_heads, read_head
from clpl_moe.evaluate.metrics import M3_SCORES, M3_WEIGHTS

if TYPE_CHECKING:
    from clpl_moe.encoder import Encoder
    from clpl_moe.retrieval.collection import Collection
    from clpl_moe.retrieval.options import EncodingArguments

_QUERIES_AT_ONCE = 512


class M3Heads(NamedTuple):
    """The heads of a BGE-M3 model: token state (D) to weight (1), and to vector (C)."""

    sparse: nn.Linear
    multi_vector: nn.Linear

    def fingerprint(self) -> str:
        """Hash of the weights."""
        digest = hashlib.sha256()
        for head in self:
            for tensor in (head.weight, head.bias):
                digest.update(f"{tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def load_heads(name: str | Path, hidden_size: int, revision: str | None = None) -> M3Heads | None:
    """The heads of a model folder or of a hub model's revision, in float32 on the CPU; None where it lacks one of them.

    Raises :class:`UserError` where a head cannot be read or is for states of another width, or the hub cannot be asked.
    """
    files = find_heads(name, revision=revision)
    if len(files) < len(HEAD_FILES):
        return None
    return M3Heads(*(_load_linear(files[file], hidden_size) for file in HEAD_FILES))


def rerank(
    encoder: Encoder,
    heads: M3Heads,
    collection: Collection,
    candidates: Mapping[str, Sequence[str]],
    encoding: EncodingArguments,
    *,
    weights: Sequence[float] = M3_WEIGHTS,
) -> dict[str, dict[str, dict[str, float]]]:
    """Score candidates (query id -> passage ids) in each of ``M3_SCORES``: kind -> query id -> passage id -> score.

    Raises :class:`UserError` where a batch does not fit in memory.
    """
    wanted = {passage_id for ids in candidates.values() for passage_id in ids}
    # Ids may lie on disk: they are read once.
    places = {identifier: place for place, identifier in enumerate(collection.passage_ids) if identifier in wanted}
    texts = dict(zip(collection.query_ids, collection.queries))
    queries = [texts[query_id] for query_id in candidates]
    wanted_places = [[places[passage_id] for passage_id in ids] for ids in candidates.values()]
    scores = score_candidates(encoder, heads, queries, collection.passages, wanted_places, encoding)
    runs: dict[str, dict[str, dict[str, float]]] = {kind: {} for kind in M3_SCORES}
    for (query_id, ids), own in zip(candidates.items(), scores):
        for kind, values in combine(own, weights).items():
            runs[kind][query_id] = dict(zip(ids, values.tolist()))
    return runs


def combine(scores: Tensor, weights: Sequence[float] = M3_WEIGHTS) -> dict[str, Tensor]:
    """The scores (n,) of each of ``M3_SCORES`` from dense, sparse and multi-vector ones (n, 3), in float32; no weight of
    those three is negative, the first two are not both 0."""
    dense, sparse, multi_vector = scores.unbind(1)
    w_dense, w_sparse, w_multi = weights
    both = w_dense * dense + w_sparse * sparse
    return {
        "sparse": sparse,
        "multi-vec": multi_vector,
        "dense+sparse": both / (w_dense + w_sparse),
        "all": (both + w_multi * multi_vector) / (w_dense + w_sparse + w_multi),
    }


def score_candidates(
    encoder: Encoder,
    heads: M3Heads,
    queries: Sequence[str],
    passages: Sequence[str],
    candidates: Sequence[Sequence[int]],
    encoding: EncodingArguments,
) -> list[Tensor]:
    """Dense, sparse and multi-vector score of each candidate: for each query (candidates, 3) float32 on the CPU.

    ``candidates`` are for each query places in ``passages``, none twice; only those passages are read.
    """
    for head in heads:
        head.to(encoder.model.device)
    blocks = [slice(start, start + _QUERIES_AT_ONCE) for start in range(0, len(queries), _QUERIES_AT_ONCE)]
    total = sum(len({place for own in candidates[block] for place in own}) for block in blocks)
    results = []
    bar = tqdm(total=total, desc="rerank", unit="passage", leave=False)
    with bar, onednn_linear(encoder.model, encoder.dtype):
        for block in blocks:
            results += _score_block(encoder, heads, queries[block], passages, candidates[block], encoding, bar)
    return results


@torch.inference_mode()
def _score_block(
    encoder: Encoder,
    heads: M3Heads,
    queries: Sequence[str],
    passages: Sequence[str],
    candidates: Sequence[Sequence[int]],
    encoding: EncodingArguments,
    bar: tqdm,
) -> list[Tensor]:
    results = [torch.zeros(len(own), 3) for own in candidates]
    asked: dict[int, list[tuple[int, int]]] = {}  # passage -> query, place among its candidates
    for query, own in enumerate(candidates):
        for rank, place in enumerate(own):
            asked.setdefault(place, []).append((query, rank))
    if not asked:
        return results
    index = _QueryIndex(encoder, heads, list(queries), encoding)
    order = sorted(asked)  # the order of the file
    texts = [passages[place] for place in order]
    for batch, tokens in _token_level(encoder, heads, texts, "passage", encoding):
        pairs: list[tuple[int, list[int]]] = []  # query, places among its candidates
        scores = []
        for row, same in enumerate(batch):
            # Once for equal passages: products round by their place in the matrix, and ties must stay ties.
            ranks: dict[int, list[int]] = {}  # query -> the places of this text among its candidates
            for query, rank in (pair for i in same for pair in asked[order[i]]):
                ranks.setdefault(query, []).append(rank)
            pairs += ranks.items()
            scores.append(index.score(list(ranks), tokens, row))
        for (query, places), values in zip(pairs, torch.cat(scores).cpu()):  # one wait for the device a batch
            results[query][places] = values
        bar.update(sum(map(len, batch)))
    return results


@dataclass
class _Tokens:
    """The model's outputs for n texts of up to L tokens, padded on the right."""

    ids: Tensor  # (n, L) int64
    lengths: list[int]  # of each text, in tokens
    dense: Tensor  # (n, D), of length 1
    weights: Tensor  # (n, L), at least 0; 0 for special tokens and padding
    vectors: Tensor  # (n, L - 1, C), of length 1; 0 for padding


class _QueryIndex:
    """The queries of a block, in one padded array each."""

    def __init__(self, encoder: Encoder, heads: M3Heads, queries: list[str], encoding: EncodingArguments) -> None:
        parts: dict[int, tuple[Tensor, ...]] = {}
        for batch, tokens in _token_level(encoder, heads, queries, "query", encoding):
            for row, same in enumerate(batch):
                length = tokens.lengths[row]
                entries, inverse = tokens.ids[row, :length].unique(return_inverse=True)
                weights = tokens.weights[row, :length]
                greatest = weights.new_zeros(len(entries)).scatter_reduce(0, inverse, weights, "amax")
                part = (tokens.dense[row], entries, greatest, tokens.vectors[row, : length - 1].clone())
                parts.update((i, part) for i in same)
        dense, entries, maxima, vectors = map(list, zip(*(parts[i] for i in range(len(queries)))))
        self.dense = torch.stack(dense)  # (n, D)
        self.entries = nn.utils.rnn.pad_sequence(entries, batch_first=True, padding_value=-1)  # (n, E), each once
        self.weights = nn.utils.rnn.pad_sequence(maxima, batch_first=True)  # (n, E)
        self.vectors = nn.utils.rnn.pad_sequence(vectors, batch_first=True)  # (n, V, C)
        self.counts = torch.tensor([len(v) for v in vectors], device=self.dense.device)  # (n,)

    def score(self, queries: list[int], passages: _Tokens, passage: int) -> Tensor:
        """Dense, sparse and multi-vector score (m, 3) of m queries with a passage of a batch."""
        rows = torch.tensor(queries, device=self.dense.device)
        length = passages.lengths[passage]
        dense = self.dense[rows] @ passages.dense[passage]
        same = self.entries[rows].unsqueeze(2) == passages.ids[passage, :length]  # (m, E, L)
        found = torch.where(same, passages.weights[passage, :length], 0).amax(2)  # (m, E)
        sparse = (self.weights[rows] * found).sum(1)
        if length < 2:  # no token but the first
            return torch.stack([dense, sparse, torch.zeros_like(dense)], dim=1)
        products = self.vectors[rows] @ passages.vectors[passage, : length - 1].T  # (m, V, L - 1)
        # The vectors of padding are 0, and so are their products.
        multi_vector = products.amax(2).sum(1) / self.counts[rows].clamp(min=1)
        return torch.stack([dense, sparse, multi_vector], dim=1)


def _token_level(
    encoder: Encoder, heads: M3Heads, texts: list[str], kind: Literal["query", "passage"], encoding: EncodingArguments
) -> Iterator[tuple[list[list[int]], _Tokens]]:
    """Batches of distinct texts, longest first: for each text its places in ``texts``, and the batch's outputs."""
    length = encoding.query_max_len if kind == "query" else encoding.passage_max_len
    tokenized = tokenize(encoder, texts, kind=kind, max_length=length)
    places: list[list[int]] = [[] for _ in tokenized.sequences]
    for place, sequence in enumerate(tokenized.places.tolist()):
        places[sequence].append(place)
    batch_tokens = encoding.batch_tokens or default_batch_tokens(encoder.model)
    for batch in batches(tokenized.sequences, batch_tokens, padded=True):
        sequences = [tokenized.sequences[i] for i in batch]
        with refuse_too_large(sequences, encoder.model.device, batch_tokens):
            tokens = _embed_tokens(encoder, heads, sequences)
        yield [places[i] for i in batch], tokens


@torch.inference_mode()
def _embed_tokens(encoder: Encoder, heads: M3Heads, sequences: list[np.ndarray]) -> _Tokens:
    model, tokenizer = encoder.model, encoder.tokenizer
    lengths = [len(sequence) for sequence in sequences]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)  # (n, L)
    ids = torch.full(mask.shape, tokenizer.pad_token_id or 0)
    ids[mask] = torch.from_numpy(np.concatenate(sequences)).long()
    ids, mask = ids.to(model.device), mask.to(model.device)
    with autocast(model, encoder.dtype):
        states = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    states = states.float()  # (n, L, D)
    special = [tokenizer.cls_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id]
    without = torch.tensor([i for i in special if i is not None], device=model.device)
    weights = heads.sparse(states).squeeze(-1).relu() * (mask & ~torch.isin(ids, without))  # (n, L)
    vectors = F.normalize(heads.multi_vector(states[:, 1:]), dim=-1) * mask[:, 1:, None]  # (n, L - 1, C)
    dense = F.normalize(pool(states, mask, encoder.settings.pooling)[:, : encoder.dimensions], dim=-1)
    return _Tokens(ids, lengths, dense, weights, vectors)


def _load_linear(file: str, hidden_size: int) -> nn.Linear:
    head = read_head(file)
    if not all(tensor.isfinite().all() for tensor in head.values()):
        raise UserError(f"{at(file)}: holds NaN or infinite weights")
    out, width = head["weight"].shape
    if width != hidden_size:
        raise UserError(f"{at(file)}: found a head for states of width {width}, the model's are {hidden_size}")
    linear = nn.Linear(width, out)
    linear.load_state_dict(head)
    return linear.requires_grad_(False)
