"""Contrastive learning penalty loss (CLPL).

For a query *i* with a positive passage, hard negatives and, optionally, other passages of the batch as negatives:

1. ``CL_i`` is the cross entropy of the query's cosine similarities to these passages, divided by a temperature.
2. ``PEN_i`` is the mean, over the pairs of a hard negative of *i* and a query that this negative does answer (a negative
   query), of one minus their cosine similarity. It keeps a negative near its own queries while the contrastive term pushes
   it away. With ``penalty="contrastive"`` it is the mean of the pairs' own cross entropy instead: each is one more example.
3. ``CLPL_i = (1 - λ) · CL_i + λ · PEN_i``; where *i* has no such pair, ``CLPL_i = CL_i``.
4. The loss is the mean over the queries, plus, where asked for, γ times the mean cross entropy of the positives'
   similarities to all queries of the batch (each positive has to find its query).

With ``equal_weights``, the mean over all queries and pairs takes the place of 3. ``same_tower_negatives`` adds negatives to
the cross entropies of 1 and 2, ``hardness_weight`` weighs the negatives by their similarity. With ``matryoshka_dims`` all
of this is computed of the embeddings' first dimensions, scaled to length 1 again, for each number of them, and summed.

Source: J. Yu, "Efficient fine-tuning methodology of text embedding models for information retrieval: contrastive
learning penalty (CLP)", arXiv:2412.17364, equation 3, with the mean of its published implementation. The contrastive
penalty is this project's; the direction from passage to query is that of Z. Li et al., arXiv:2308.03281, section 3.3, and
so are negatives of the same tower, with the masks of Y. Zhang et al., arXiv:2506.05176, section 3. Weights by hardness:
Z. Lan et al., arXiv:2503.04812, equation 5. Matryoshka: A. Kusupati et al., arXiv:2205.13147, equation 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clpl_moe.loss.distributed import gather_rows
from clpl_moe.loss.options import CLPLOptions


@dataclass
class CLPLOutput:
    """The terms of one batch, by name; scalars in the precision that the loss was computed in. With ``matryoshka_dims`` those
    but ``loss`` and ``added`` are of the largest number of dimensions.

    Attributes:
        loss: what to call ``backward`` on.
        contrastive: mean of ``CL_i`` over the queries.
        penalty: mean of ``PEN_i`` over the queries that have a penalty, 0 where none has.
        positive_similarity: mean cosine of a query and its positive (detached).
        negative_similarity: mean cosine of a query and its own negatives (detached); None where groups have none.
        negative_query_similarity: mean cosine of a negative and the queries that it answers (detached); None without any.
        symmetric: mean cross entropy from positives to queries; None without ``symmetric_weight``.
        added: all weighted terms but the contrastive one, to be added to a loss that takes its place.
        of_dimensions: with ``matryoshka_dims``, the loss of each number of dimensions (detached, without its weight).
    """

    loss: Tensor
    contrastive: Tensor
    penalty: Tensor
    positive_similarity: Tensor
    negative_similarity: Tensor | None = None
    negative_query_similarity: Tensor | None = None
    symmetric: Tensor | None = None
    added: tuple[Tensor, ...] = ()
    of_dimensions: dict[int, Tensor] = field(default_factory=dict)

    def terms(self) -> dict[str, Tensor]:
        """The detached terms that the batch has, for a log; without pairs there is no penalty, rather than one of 0."""
        absent = {"loss", "added", "of_dimensions"} | ({"penalty"} if self.negative_query_similarity is None else set())
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in absent}
        found = {name: value.detach() for name, value in values.items() if value is not None}
        return found | {f"loss_{dimensions}": value for dimensions, value in self.of_dimensions.items()}


@dataclass
class _Batch:
    """A batch of embeddings whose dot products are cosines; pairs are those of a negative and a query that it answers."""

    query: Tensor  # (B, D)
    passages: Tensor  # (B·G, D), G for each query, its positive first
    group: int  # G
    queries: Tensor  # (B + M, D), the query of each group and of each pair
    rows: Tensor  # (B + M,), the row of the passage that answers each of them
    candidates: Tensor  # (P, D), the passages that queries choose from: those of all processes where gathered
    offset: int  # the row of the first of ``passages`` among the candidates
    no_negatives: Tensor | None  # (B + M, P), which candidates are none of each query, whatever their similarity
    filling: Tensor | None  # (B·G,), which passages only fill up a group
    heads: Tensor  # (P/G, D), the queries of the candidates' groups
    query_ids: Tensor | None  # (B + M,), equal for equal texts of queries
    head_ids: Tensor | None  # (P/G,)

    def truncated(self, dimensions: int) -> _Batch:
        """The batch with the embeddings' first ``dimensions``; what is one tensor stays one."""
        queries, passages = truncated(self.queries, dimensions), truncated(self.passages, dimensions)
        query = queries[: len(self.query)]
        candidates = passages if self.candidates is self.passages else truncated(self.candidates, dimensions)
        heads = query if self.heads is self.query else truncated(self.heads, dimensions)
        return replace(self, query=query, passages=passages, queries=queries, candidates=candidates, heads=heads)


class CLPLLoss(CLPLOptions, nn.Module):
    """Contrastive loss with a penalty that keeps hard negatives near the queries they answer.

    Args:
        temperature: divides the similarities in the contrastive term.
        penalty_weight: λ, the share of the penalty; 0 is the plain contrastive loss.
        in_batch_negatives: whether the passages of the batch's other queries count as negatives too.
        false_negative_margin: where given, a passage other than the query's positive is left out of the contrastive
            term if its similarity exceeds the positive's by more than this margin (it is likely to be relevant).
        normalize: set to False where the embeddings are L2-normalised already.
        gather_across_devices: whether the passages of all processes count as negatives. Gradients are such that,
            averaged over the processes as DistributedDataParallel does, they equal those of one process on the joint
            batch. Every process needs the same number of passages. Needs ``in_batch_negatives``.
        penalty: ``"cosine"``, as in the paper, or ``"contrastive"``: negative queries have to find their negatives
            among the same passages, at the same temperature, as the batch's queries their positives.
        penalty_temperature: divides the similarities in the penalty; None: the cosine penalty is not divided, the
            contrastive one has ``temperature``. Undivided, the cosine penalty has weaker gradients than the contrastive
            term, by a factor of up to 1 / ``temperature``.
        equal_weights: the loss is the mean of the ``CL_i`` of all queries and the penalties of all pairs, so that each
            negative query weighs as much as a query of the batch. ``penalty_weight`` has no effect then.
        same_tower_negatives: whether the softmax of a query also has its similarities to the queries of other groups, and
            its positive's similarities to their passages; negative queries are no negatives. Left out are equal
            queries, passages that are known to answer the query, and their queries. Needs ``in_batch_negatives``.
        hardness_weight: β; each negative counts exp(β · similarity) times in the softmax. The weight has no gradient.
        symmetric_weight: γ, the weight of the term from positives to the queries of this process; 0 leaves it out.
        matryoshka_dims: numbers of dimensions, D at most. The loss is the sum of the losses of embeddings truncated to each of
            them and scaled to length 1 again. D itself counts only where it is among them.
        matryoshka_weights: the weight of each of them in the sum; None: 1 each.

    Each is an attribute too, which may be changed during training. ``dataclasses.replace`` makes a loss with other options.
    A negative without a query that it answers only lacks the penalty.

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

    def __post_init__(self) -> None:
        nn.Module.__init__(self)
        super().__post_init__()

    def forward(
        self,
        query: Tensor,
        passages: Tensor,
        negative_queries: Tensor | None = None,
        negative_index: Tensor | None = None,
        passage_ids: Tensor | None = None,
        query_ids: Tensor | None = None,
        answer_ids: Tensor | None = None,
        answer_index: Tensor | None = None,
    ) -> CLPLOutput:
        """Compute the terms of one batch, in float32 or, for float64 embeddings, in float64 (also under autocast).

        Args:
            query: (B, D) embeddings of the queries.
            passages: (B·G, D) embeddings; rows ``i·G`` to ``i·G + G - 1`` are query ``i``'s positive, then its negatives.
            negative_queries: (M, D) embeddings of queries that negatives answer, any number for each negative.
            negative_index: (M,) int64, for each of these queries the row of ``passages`` that answers it.
            passage_ids: (B·G,) int64, equal for equal texts. What equals the passage that answers a query is then none of
                its negatives. -1: the passage only fills up a group that has fewer negatives, and is no negative at all.
            query_ids: (B + M,) int64 of ``query``, then ``negative_queries``, equal for equal texts. A query is then no
                negative of an equal one.
            answer_ids: (K,) int64, more passages that are no negatives of a query, by their ``passage_ids``.
            answer_index: (K,) int64, for each of them the query's row in ``query_ids``.

        Raises:
            ValueError: shapes that do not fit together.
        """
        answers = None if answer_ids is None or answer_index is None else (answer_ids, answer_index)
        _check_shapes(query, passages, negative_queries, negative_index, passage_ids, query_ids)
        _check_answers(answer_ids, answer_index, passage_ids)
        if self.matryoshka_dims is not None and (most := max(self.matryoshka_dims)) > (whole := query.shape[1]):
            raise ValueError(f"matryoshka_dims: found {most}, expected at most {whole}, the embeddings' dimensions")
        with torch.autocast(query.device.type, enabled=False):
            batch = self._prepare(query, passages, negative_queries, negative_index, passage_ids, query_ids, answers)
            number = self._number_of_queries(batch) if self.equal_weights else len(query)
            if self.matryoshka_dims is None:
                return self._terms(batch, number)
            parts = {d: self._terms(batch.truncated(d), number) for d in self.matryoshka_dims}
            weights = self.weights_of_dimensions(query.shape[1])
            return replace(
                parts[max(parts)],
                loss=torch.stack([weights[d] * part.loss for d, part in parts.items()]).sum(),
                added=tuple(weights[d] * term for d, part in parts.items() for term in part.added),
                of_dimensions={d: part.loss.detach() for d, part in parts.items()},
            )

    def _terms(self, batch: _Batch, number: Tensor | int) -> CLPLOutput:
        """The terms of a batch; ``number`` of queries of the mean with ``equal_weights``."""
        size = len(batch.query)
        contrastive = self._cross_entropy(slice(size), batch, self.temperature)  # (B,) CL
        losses, penalty, pair_similarity = contrastive, contrastive.new_zeros(()), None
        added = []
        if len(batch.queries) > size:
            penalties, pairs, pair_similarity = self._penalties(batch)  # (B,) PEN, (B,), (M,)
            has_pair = pairs > 0
            penalty = penalties.sum() / has_pair.sum()
            if self.equal_weights:
                added.append((pairs * penalties).sum() / number)
            else:
                mixed = (1 - self.penalty_weight) * contrastive + self.penalty_weight * penalties
                losses = torch.where(has_pair, mixed, contrastive)  # (B,) CLPL
                added.append(self.penalty_weight * has_pair.to(losses.dtype).mean() * penalty)
        loss, symmetric = losses.mean(), None
        if self.equal_weights:
            loss = sum(added, start=contrastive.sum() / number)
        if self.symmetric_weight:
            symmetric = self._symmetric(batch)
            added.append(self.symmetric_weight * symmetric)
            loss = loss + added[-1]
        own = batch.passages.view(size, batch.group, -1)
        similarity = torch.einsum("bd,bgd->bg", batch.query, own).detach()
        return CLPLOutput(
            loss=loss,
            contrastive=contrastive.mean(),
            penalty=penalty,
            positive_similarity=similarity[:, 0].mean(),
            negative_similarity=_mean_of_negatives(similarity, batch.filling) if batch.group > 1 else None,
            negative_query_similarity=None if pair_similarity is None else pair_similarity.detach().mean(),
            symmetric=symmetric,
            added=tuple(added),
        )

    def _prepare(
        self,
        query: Tensor,
        passages: Tensor,
        negative_queries: Tensor | None,
        negative_index: Tensor | None,
        ids: Tensor | None,
        query_ids: Tensor | None,
        answers: tuple[Tensor, Tensor] | None,
    ) -> _Batch:
        dtype = torch.promote_types(torch.promote_types(query.dtype, passages.dtype), torch.float32)

        def prepared(embeddings: Tensor) -> Tensor:
            embeddings = embeddings.to(dtype)
            return F.normalize(embeddings, dim=-1) if self.normalize else embeddings

        query, passages = prepared(query), prepared(passages)
        group = len(passages) // len(query)
        queries, rows = query, torch.arange(len(query), device=query.device) * group
        if negative_queries is not None and negative_index is not None and len(negative_queries) > 0:
            queries, rows = torch.cat([query, prepared(negative_queries)]), torch.cat([rows, negative_index])
        candidates, offset = passages, 0
        if self.gather_across_devices:
            candidates, offset = gather_rows(passages)
        heads, head_ids = query, None if query_ids is None else query_ids[: len(query)]
        if self.gather_across_devices and self.same_tower_negatives:
            heads, head_ids = gather_rows(query)[0], None if head_ids is None else gather_rows(head_ids)[0]
        no_negatives = filling = None
        if ids is not None:
            filling = ids == -1
            ids = gather_rows(ids)[0] if self.gather_across_devices else ids
            no_negatives = find_no_negatives(ids, offset + rows, answers)
        return _Batch(
            query, passages, group, queries, rows, candidates, offset, no_negatives, filling, heads, query_ids, head_ids
        )

    def _number_of_queries(self, batch: _Batch) -> Tensor:
        """B + M; where passages are gathered, its mean over the processes, which need not have as many pairs."""
        number = batch.query.new_full((1,), len(batch.queries))
        return (gather_rows(number)[0] if self.gather_across_devices else number).mean()

    def _cross_entropy(self, which: slice, batch: _Batch, temperature: float) -> Tensor:
        """(M,) cross entropy of ``which`` of the queries, each to find its passage among the candidates."""
        queries, rows = batch.queries[which], batch.rows[which]
        candidates, ignored = batch.candidates, None if batch.no_negatives is None else batch.no_negatives[which]
        if self.in_batch_negatives:
            similarities = queries @ candidates.T  # (M, P)
            target = batch.offset + rows
        else:  # the row's own group only
            owner, target = rows // batch.group, rows % batch.group
            groups = candidates.view(-1, batch.group, candidates.shape[-1])
            similarities = torch.einsum("md,mgd->mg", queries, groups[owner])
            if ignored is not None:
                ignored = ignored.view(len(queries), -1, batch.group)[
                    torch.arange(len(queries), device=owner.device), owner
                ]
        column = target.unsqueeze(1)
        if self.same_tower_negatives:
            others, no_negatives = self._same_tower(which, batch)
            ignored = torch.zeros_like(similarities, dtype=torch.bool) if ignored is None else ignored
            similarities, ignored = torch.cat([similarities, others], 1), torch.cat([ignored, no_negatives], 1)
        fixed = similarities.detach()
        if self.false_negative_margin is not None:
            above = fixed > fixed.gather(1, column) + self.false_negative_margin
            ignored = above if ignored is None else ignored | above
        if ignored is not None:  # texts that are relevant too, or probably so; never the positive itself
            similarities = similarities.masked_fill(ignored.scatter(1, column, False), -torch.inf)
        logits = similarities / temperature
        if self.hardness_weight:
            logits = logits + self.hardness_weight * fixed.scatter(1, column, 0.0)
        return F.cross_entropy(logits, target, reduction="none")

    def _same_tower(self, which: slice, batch: _Batch) -> tuple[Tensor, Tensor]:
        """(M, P/G + P) similarities of ``which`` queries to those of all groups, and of their passages to all candidates;
        and a mask of those that are no negatives: of the own group, of equal texts, or answered by what answers the query."""
        rows = batch.rows[which]
        similarities = torch.cat(
            [batch.queries[which] @ batch.heads.T, batch.passages[rows] @ batch.candidates.T], dim=1
        )
        column = torch.arange(len(batch.candidates), device=rows.device)
        column = torch.cat([column[:: batch.group], column])  # the candidate that each column is, or is answered by
        target = (batch.offset + rows).unsqueeze(1)
        no_negatives = column // batch.group == target // batch.group
        if batch.no_negatives is not None:
            no_negatives |= batch.no_negatives[which][:, column]
        if batch.query_ids is not None and batch.head_ids is not None:
            no_negatives[:, : len(batch.heads)] |= batch.head_ids == batch.query_ids[which].unsqueeze(1)
        return similarities, no_negatives

    def _penalties(self, batch: _Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(B,) mean penalty of each query's pairs; (B,) how many it has; (M,) the pairs' similarities."""
        which = slice(len(batch.query), None)
        queries, rows = batch.queries[which], batch.rows[which]
        negatives = batch.passages[rows]  # (M, D)
        similarity = (negatives * queries).sum(-1)  # (M,)
        if self.penalty == "contrastive":
            of_pairs = self._cross_entropy(which, batch, self.penalty_temperature or self.temperature)  # (M,)
        else:
            of_pairs = 1 - (similarity if self.normalize else F.cosine_similarity(negatives, queries))
            if self.penalty_temperature is not None:
                of_pairs = of_pairs / self.penalty_temperature
        owner = rows // batch.group  # (M,) the query whose negative this is
        zeros = of_pairs.new_zeros(len(batch.query))
        number = zeros.index_add(0, owner, torch.ones_like(of_pairs))
        return zeros.index_add(0, owner, of_pairs) / number.clamp(min=1), number, similarity

    def _symmetric(self, batch: _Batch) -> Tensor:
        """Mean cross entropy of positives, each to find its query among this process's but others that it answers."""
        positives = batch.passages[:: batch.group]  # (B, D)
        target = torch.arange(len(positives), device=positives.device)
        own = batch.rows[target]  # (B,)
        answered = own.unsqueeze(1) == batch.rows  # (B, B + M)
        if batch.no_negatives is not None:
            answered = batch.no_negatives[:, batch.offset + own].T
        answered = answered.scatter(1, target.unsqueeze(1), False)
        similarities = (positives @ batch.queries.T).masked_fill(answered, -torch.inf)  # (B, B + M)
        return F.cross_entropy(similarities / self.temperature, target)


def truncated(embeddings: Tensor, dimensions: int) -> Tensor:
    """The first ``dimensions`` of embeddings (n, D), scaled to length 1 again; all D stay as they are."""
    if dimensions == embeddings.shape[-1]:
        return embeddings
    return F.normalize(embeddings[..., :dimensions], dim=-1)


def find_no_negatives(ids: Tensor, targets: Tensor, answers: tuple[Tensor, Tensor] | None) -> Tensor:
    """(B + M, P) which of the candidates, of these ``ids`` (P,), are no negatives of each query: the same text as its own
    answer, one of ``targets`` (B + M,), or known to answer it (``answer_ids`` and ``answer_index``), or there only to fill up a
    group."""
    no_negatives = (ids[targets].unsqueeze(1) == ids) | (ids == -1)
    if answers is not None:
        answer_ids, index = answers
        equal = (answer_ids.unsqueeze(1) == ids).float()  # (K, P)
        no_negatives |= equal.new_zeros(no_negatives.shape).index_add(0, index, equal) > 0
    return no_negatives


def _mean_of_negatives(similarity: Tensor, filling: Tensor | None) -> Tensor:
    """Mean of (B, G) but for the positives and what only fills up the groups."""
    if filling is None:
        return similarity[:, 1:].mean()
    real = ~filling.view(similarity.shape)[:, 1:]
    return similarity[:, 1:].masked_fill(~real, 0).sum() / real.sum().clamp(min=1)


def _check_answers(answer_ids: Tensor | None, answer_index: Tensor | None, passage_ids: Tensor | None) -> None:
    if answer_ids is None and answer_index is None:
        return
    if answer_ids is None or answer_index is None or passage_ids is None:
        raise ValueError("answer_ids, answer_index and passage_ids belong together: give all, or none of the first two")
    if answer_ids.ndim != 1 or answer_index.shape != answer_ids.shape:
        found = f"answer_ids is {tuple(answer_ids.shape)} and answer_index {tuple(answer_index.shape)}"
        raise ValueError(f"{found}: expected (K,) each, an answer and the row of its query")


def _check_shapes(
    query: Tensor,
    passages: Tensor,
    negative_queries: Tensor | None,
    negative_index: Tensor | None,
    passage_ids: Tensor | None,
    query_ids: Tensor | None,
) -> None:
    if query.ndim != 2 or passages.ndim != 2 or query.shape[1] != passages.shape[1]:
        found = f"query is {tuple(query.shape)} and passages {tuple(passages.shape)}"
        raise ValueError(f"{found}: expected (B, D) and (B·G, D)")
    if len(query) == 0 or len(passages) == 0 or len(passages) % len(query):
        raise ValueError(
            f"{len(passages)} passages for {len(query)} queries: expected the same number for each, the positive first"
        )
    if passage_ids is not None and passage_ids.shape != passages.shape[:1]:
        raise ValueError(f"passage_ids is {tuple(passage_ids.shape)}: expected ({passages.shape[0]},)")
    number = len(query) + (0 if negative_queries is None else len(negative_queries))
    if query_ids is not None and query_ids.shape != (number,):
        raise ValueError(f"query_ids is {tuple(query_ids.shape)}: expected ({number},), also for negative_queries")
    if negative_queries is None and negative_index is None:
        return
    if negative_queries is None or negative_index is None:
        raise ValueError("negative_queries and negative_index belong together: give both, or neither")
    if negative_queries.ndim != 2 or (negative_queries.shape[1] != query.shape[1] and len(negative_queries)):
        raise ValueError(f"negative_queries is {tuple(negative_queries.shape)}: expected (M, {query.shape[1]})")
    if negative_index.shape != negative_queries.shape[:1] or negative_index.dtype != torch.int64:
        raise ValueError(
            f"negative_index is {tuple(negative_index.shape)} of {negative_index.dtype}: expected int64"
            f" ({negative_queries.shape[0]},), a row of passages for each of the negative_queries"
        )
