"""Contrastive learning penalty loss (CLPL).

For a query *i* with a positive passage, hard negatives and, optionally, other passages of the batch as negatives:

1. ``CL_i`` is the cross entropy of the query's cosine similarities to these passages, divided by a temperature.
2. ``PEN_i`` is the mean, over the pairs of a hard negative of *i* and a query that this negative does answer, of one
   minus their cosine similarity. It keeps a negative near its own queries while the contrastive term pushes it away.
   With ``penalty="contrastive"`` it is the mean of these pairs' own cross entropy instead: each such query has to find its
   passage among the batch's, as query *i* has to, which is one more training example for every pair.
3. ``CLPL_i = (1 - λ) · CL_i + λ · PEN_i``; where *i* has no such pair, ``CLPL_i = CL_i``.
4. The loss is the mean over the queries, plus, where asked for, γ times the mean cross entropy of the positives'
   similarities to all queries of the batch (each positive has to find its query).

Source: J. Yu, "Efficient fine-tuning methodology of text embedding models for information retrieval: contrastive
learning penalty (CLP)", arXiv:2412.17364, equation 3, with the mean of its published implementation. The contrastive penalty is this project's; the
direction from passage to query is that of Z. Li et al., arXiv:2308.03281, section 3.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

Penalty = Literal["cosine", "contrastive"]


@dataclass
class CLPLOutput:
    """The terms of one batch, by name; scalars in the precision that the loss was computed in.

    Attributes:
        loss: what to call ``backward`` on.
        contrastive: mean of ``CL_i`` over the queries.
        penalty: mean of ``PEN_i`` over the queries that have a penalty, 0 where none has.
        positive_similarity: mean cosine of a query and its positive (detached).
        negative_similarity: mean cosine of a query and its own negatives (detached); None where groups have none.
        negative_query_similarity: mean cosine of a negative and the queries that it answers, the drift that the
            penalty is there to stop (detached); None where the batch has no such query.
        symmetric: mean cross entropy from positives to queries; None without ``symmetric_weight``.
    """

    loss: Tensor
    contrastive: Tensor
    penalty: Tensor
    positive_similarity: Tensor
    negative_similarity: Tensor | None = None
    negative_query_similarity: Tensor | None = None
    symmetric: Tensor | None = None


@dataclass
class _Candidates:
    """The passages that queries have to choose from.

    Attributes:
        passages: (P, D), those of all processes where gathered.
        offset: where this process's begin.
        ids: (P,), equal for equal texts, or None.
        group: passages of each query.
    """

    passages: Tensor
    offset: int
    ids: Tensor | None
    group: int


class CLPLLoss(nn.Module):
    """Contrastive loss with a penalty that keeps hard negatives near the queries they answer.

    Args:
        temperature: divides the similarities in the contrastive term.
        penalty_weight: λ, the share of the penalty; 0 is the plain contrastive loss. May be changed during training.
        in_batch_negatives: whether the passages of the batch's other queries count as negatives too.
        false_negative_margin: where given, a passage other than the query's positive is left out of the contrastive
            term if its similarity exceeds the positive's by more than this margin (it is likely to be relevant).
        normalize: set to False where the embeddings are L2-normalised already.
        gather_across_devices: whether the passages of all processes count as negatives. Gradients are such that,
            averaged over the processes as DistributedDataParallel does, they equal those of one process on the joint
            batch. Every process needs the same number of passages. Needs ``in_batch_negatives``.
        penalty: ``"cosine"``, the paper's, or ``"contrastive"``: the queries that a negative answers have to find it
            among the same passages, at the same temperature, as the batch's queries their positives.
        symmetric_weight: γ, the weight of the term from positives to the queries of this process; 0 leaves it out.

    Inputs:
        See :meth:`forward`.

    Recommendations:
        Give each negative the queries that it answers where they are known (other questions about the same passage), or
        let a language model write one. A negative without any only lacks the penalty.

    Example:
        >>> import torch
        >>> from clpl_moe import CLPLLoss
        >>> query, passages = torch.randn(2, 8), torch.randn(2 * 3, 8, requires_grad=True)
        >>> negative_queries = torch.randn(3, 8)  # two answered by row 1, one by row 5 of the passages
        >>> terms = CLPLLoss(temperature=0.02, penalty_weight=0.1)(
        ...     query, passages, negative_queries=negative_queries, negative_index=torch.tensor([1, 1, 5])
        ... )
        >>> terms.loss.backward()
        >>> passages.grad.shape
        torch.Size([6, 8])
    """

    def __init__(
        self,
        temperature: float = 0.02,
        penalty_weight: float = 0.1,
        *,
        in_batch_negatives: bool = True,
        false_negative_margin: float | None = None,
        normalize: bool = True,
        gather_across_devices: bool = False,
        penalty: Penalty = "cosine",
        symmetric_weight: float = 0.0,
    ) -> None:
        super().__init__()
        if not (isinstance(temperature, (int, float)) and math.isfinite(temperature) and temperature > 0):
            raise ValueError(
                f"temperature is {temperature}: the similarities are divided by it, choose a number above 0, such as 0.02"
            )
        if not (isinstance(penalty_weight, (int, float)) and 0 <= penalty_weight <= 1):
            raise ValueError(
                f"penalty_weight is {penalty_weight}: it is the penalty's share of the loss, choose a number from 0 to 1"
            )
        if false_negative_margin is not None and not math.isfinite(false_negative_margin):
            raise ValueError(f"false_negative_margin is {false_negative_margin}: choose a finite number, or None")
        if gather_across_devices and not in_batch_negatives:
            raise ValueError(
                "gather_across_devices adds other processes' passages as negatives, in_batch_negatives=False forbids"
                " even this process's own: set in_batch_negatives=True"
            )
        if penalty not in get_args(Penalty):
            raise ValueError(f"penalty is {penalty!r}: choose one of {', '.join(get_args(Penalty))}")
        if not (isinstance(symmetric_weight, (int, float)) and 0 <= symmetric_weight < math.inf):
            raise ValueError(f"symmetric_weight is {symmetric_weight}: choose a finite number, 0 or above")
        self.temperature = float(temperature)
        self.penalty_weight = float(penalty_weight)
        self.in_batch_negatives = in_batch_negatives
        self.false_negative_margin = false_negative_margin
        self.normalize = normalize
        self.gather_across_devices = gather_across_devices
        self.penalty = penalty
        self.symmetric_weight = float(symmetric_weight)

    def extra_repr(self) -> str:
        return (
            f"temperature={self.temperature}, penalty_weight={self.penalty_weight},"
            f" in_batch_negatives={self.in_batch_negatives}, false_negative_margin={self.false_negative_margin},"
            f" penalty={self.penalty}, symmetric_weight={self.symmetric_weight}"
        )

    def forward(
        self,
        query: Tensor,
        passages: Tensor,
        negative_queries: Tensor | None = None,
        negative_index: Tensor | None = None,
        passage_ids: Tensor | None = None,
    ) -> CLPLOutput:
        """Compute the terms of one batch, in float32 or, for float64 embeddings, in float64 (also under autocast).

        Args:
            query: (B, D) embeddings of the queries.
            passages: (B·G, D) embeddings; rows ``i·G`` to ``i·G + G - 1`` are query ``i``'s positive, then its negatives.
            negative_queries: (M, D) embeddings of queries that negatives answer, any number for each negative.
            negative_index: (M,) int64, for each of these queries the row of ``passages`` that answers it.
            passage_ids: (B·G,) int64, equal for equal texts. A passage equal to the query's positive is then left out
                of its negatives.

        Raises:
            ValueError: shapes that do not fit together.
        """
        self._check_shapes(query, passages, negative_queries, negative_index, passage_ids)
        dtype = torch.promote_types(torch.promote_types(query.dtype, passages.dtype), torch.float32)
        with torch.autocast(query.device.type, enabled=False):
            query, passages = self._prepare(query, dtype), self._prepare(passages, dtype)
            batch, group = query.shape[0], passages.shape[0] // query.shape[0]
            positives = torch.arange(batch, device=query.device) * group  # (B,) their rows
            candidates = self._candidates(passages, passage_ids, group)
            own = torch.einsum("bd,bgd->bg", query, passages.view(batch, group, -1))
            contrastive = self._cross_entropy(query, positives, candidates)  # (B,)
            losses = contrastive
            penalty = contrastive.new_zeros(())
            pair_similarity = None
            queries, answers = query, positives
            if negative_queries is not None and negative_queries.shape[0] > 0:
                negative_queries = self._prepare(negative_queries, dtype)
                queries, answers = torch.cat([query, negative_queries]), torch.cat([positives, negative_index])
                pair_similarity = (passages[negative_index] * negative_queries).sum(-1)  # (M,)
                if self.penalty == "cosine":
                    pair_penalty = 1 - (
                        pair_similarity
                        if self.normalize
                        else F.cosine_similarity(passages[negative_index], negative_queries)
                    )
                else:
                    pair_penalty = self._cross_entropy(negative_queries, negative_index, candidates)
                owner = negative_index // group  # (M,) the query whose negative this is
                zeros = torch.zeros_like(contrastive)
                pairs = zeros.index_add(0, owner, torch.ones_like(pair_penalty))
                penalties = zeros.index_add(0, owner, pair_penalty) / pairs.clamp(min=1)
                has_pair = pairs > 0
                mixed = (1 - self.penalty_weight) * contrastive + self.penalty_weight * penalties
                losses = torch.where(has_pair, mixed, contrastive)
                penalty = penalties.sum() / has_pair.sum()
            loss, symmetric = losses.mean(), None
            if self.symmetric_weight:
                symmetric = self._symmetric(queries, answers, passages[positives], passage_ids)
                loss = loss + self.symmetric_weight * symmetric
            return CLPLOutput(
                loss=loss,
                contrastive=contrastive.mean(),
                penalty=penalty,
                positive_similarity=own[:, 0].detach().mean(),
                negative_similarity=own[:, 1:].detach().mean() if group > 1 else None,
                negative_query_similarity=None if pair_similarity is None else pair_similarity.detach().mean(),
                symmetric=symmetric,
            )

    def _prepare(self, embeddings: Tensor, dtype: torch.dtype) -> Tensor:
        embeddings = embeddings.to(dtype)
        return F.normalize(embeddings, dim=-1) if self.normalize else embeddings

    def _candidates(self, passages: Tensor, passage_ids: Tensor | None, group: int) -> _Candidates:
        offset = 0
        if self.gather_across_devices:
            passages, offset = gather_rows(passages)
            if passage_ids is not None:
                passage_ids, _ = gather_rows(passage_ids)
        return _Candidates(passages, offset, passage_ids, group)

    def _cross_entropy(self, queries: Tensor, rows: Tensor, candidates: _Candidates) -> Tensor:
        """(M,) cross entropy of ``queries`` (M, D) each to find the passage of its row (M,) among the candidates."""
        passages, ids, group = candidates.passages, candidates.ids, candidates.group
        if self.in_batch_negatives:
            similarities = queries @ passages.T  # (M, P)
            target = candidates.offset + rows
            ids = None if ids is None else ids.expand(len(queries), -1)
        else:
            owner = rows // group
            similarities = torch.einsum("md,mgd->mg", queries, passages.view(-1, group, passages.shape[-1])[owner])
            target = rows % group
            ids = None if ids is None else ids.view(-1, group)[owner]
        ignored = self._false_negatives(similarities.detach(), target, ids)
        if ignored is not None:
            similarities = similarities.masked_fill(ignored, -torch.inf)
        return F.cross_entropy(similarities / self.temperature, target, reduction="none")

    def _symmetric(self, queries: Tensor, answers: Tensor, positives: Tensor, passage_ids: Tensor | None) -> Tensor:
        """Mean cross entropy of positives (B, D), each to find its query, the one of the same place, among all queries.

        ``answers`` holds the row of the passage that answers each query. Queries of a passage of the same text are left out.
        """
        target = torch.arange(len(positives), device=positives.device)
        text = answers if passage_ids is None else passage_ids[answers]  # one number for each text
        same = (text == text[target].unsqueeze(1)).scatter(1, target.unsqueeze(1), False)
        similarities = (positives @ queries.T).masked_fill(same, -torch.inf)  # (B, B + M)
        return F.cross_entropy(similarities / self.temperature, target)

    def _false_negatives(self, similarities: Tensor, target: Tensor, ids: Tensor | None) -> Tensor | None:
        """Mask (B, P) of the passages that are probably relevant too; never the positive itself."""
        column = target.unsqueeze(1)
        ignored = None
        if ids is not None:
            ignored = ids == ids.gather(1, column)
        if self.false_negative_margin is not None:
            above = similarities > similarities.gather(1, column) + self.false_negative_margin
            ignored = above if ignored is None else ignored | above
        return None if ignored is None else ignored.scatter(1, column, False)

    def _check_shapes(
        self,
        query: Tensor,
        passages: Tensor,
        negative_queries: Tensor | None,
        negative_index: Tensor | None,
        passage_ids: Tensor | None,
    ) -> None:
        if query.ndim != 2 or passages.ndim != 2 or query.shape[1] != passages.shape[1]:
            raise ValueError(
                f"query is {tuple(query.shape)} and passages {tuple(passages.shape)}: expected (B, D) and (B·G, D)"
            )
        if query.shape[0] == 0 or passages.shape[0] == 0 or passages.shape[0] % query.shape[0]:
            raise ValueError(
                f"{passages.shape[0]} passages for {query.shape[0]} queries: expected the same number for each query,"
                " the positive first"
            )
        if passage_ids is not None and passage_ids.shape != passages.shape[:1]:
            raise ValueError(f"passage_ids is {tuple(passage_ids.shape)}: expected ({passages.shape[0]},)")
        if (negative_queries is None) != (negative_index is None):
            raise ValueError("negative_queries and negative_index belong together: give both, or neither")
        if negative_queries is None:
            return
        if negative_queries.ndim != 2 or (negative_queries.shape[1] != query.shape[1] and len(negative_queries)):
            raise ValueError(f"negative_queries is {tuple(negative_queries.shape)}: expected (M, {query.shape[1]})")
        if negative_index.shape != negative_queries.shape[:1] or negative_index.dtype != torch.int64:
            raise ValueError(
                f"negative_index is {tuple(negative_index.shape)} of {negative_index.dtype}: expected int64"
                f" ({negative_queries.shape[0]},), a row of passages for each of the negative_queries"
            )


def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """Rows of all processes in the order of their ranks, and where this process's begin.

    Gradients flow back to the process that a row came from, summed over the processes that used it. Without a process
    group, or with one process, the rows themselves.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows, 0
    return _GatherRows.apply(rows), dist.get_rank() * rows.shape[0]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        rows = rows.contiguous()
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows)
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]
