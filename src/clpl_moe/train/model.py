"""The model that training optimises: an encoder, FlagEmbedding's heads, CLPL, and the routers' losses."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clpl_moe.data.flag_embedding import EmbedderOutput, EncoderOnlyEmbedderM3Model
from clpl_moe.encoder.packing import PackedTexts, embed_packed, send
from clpl_moe.encoder.settings import EmbeddingSettings, pool
from clpl_moe.loss import CLPLLoss
from clpl_moe.loss.clpl import find_no_negatives, truncated
from clpl_moe.loss.distributed import gather_rows
from clpl_moe.loss.grad_cache import cached_forward, chunks_by_tokens
from clpl_moe.moe.balance import pop_router_terms, put_router_records, take_router_records, track_routers
from clpl_moe.moe.inject import has_experts

# The score of a passage that is no negative, in FlagEmbedding's losses: finite, also in float16, since a teacher's probability
# of 0 is multiplied with it.
_NO_NEGATIVE = -1e4

Features = dict[str, Tensor] | list[dict[str, Tensor]]


@dataclass
class CLPLModelOutput(EmbedderOutput):
    """``loss`` with a graph, and the terms by name, detached scalars (``expert_load``: (L, N))."""

    terms: dict[str, Tensor] | None = None


class UnifiedModel(EncoderOnlyEmbedderM3Model):
    """FlagEmbedding's M3 model; those of its losses that fail or train too slowly are mended here.

    ``no_negatives`` are masks of scores, True where a passage is no negative of a query: (B, B·G), and of all processes.
    """

    no_negatives: tuple[Tensor, ...] = ()

    def compute_dense_score(self, q_reps: Tensor, p_reps: Tensor) -> Tensor:
        return self._masked(super().compute_dense_score(q_reps, p_reps))

    def compute_sparse_score(self, q_reps: Tensor, p_reps: Tensor) -> Tensor:
        return self._masked(super().compute_sparse_score(q_reps, p_reps))

    def compute_colbert_score(self, q_reps: Tensor, p_reps: Tensor, q_mask: Tensor | None = None) -> Tensor:
        return self._masked(super().compute_colbert_score(q_reps, p_reps, q_mask=q_mask))

    def _masked(self, scores: Tensor) -> Tensor:
        for mask in self.no_negatives:
            if mask.shape == scores.shape:
                return scores.masked_fill(mask, _NO_NEGATIVE)
        return scores

    def distillation_loss(self, query: Tensor, passages: Tensor, targets: Tensor, own_only: bool) -> Tensor:
        """FlagEmbedding's loss of the dense similarities (B, D) to (B·G, D), which are to have the teacher's ``targets``."""
        across = self._compute_cross_device_neg_loss if self.negatives_cross_device else self._compute_in_batch_neg_loss
        compute = self._compute_no_in_batch_neg_loss if own_only else across
        return compute(query, passages, teacher_targets=targets, compute_score_func=self.compute_dense_score)[1]

    def unified_loss(
        self,
        dense_loss: Tensor,
        query: tuple[Tensor, ...],
        passage: tuple[Tensor, ...],
        *,
        query_mask: Tensor,
        targets: Tensor | None,
        own_only: bool,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """FlagEmbedding's joint loss of dense, sparse, multi-vector and summed scores, and its terms.

        ``dense_loss`` is the only part that sees other processes' passages. ``query`` and ``passage`` are dense (B, D) and
        (B·G, D), sparse and multi-vector embeddings; ``query_mask`` (B, L) is 1 where a token is no padding; ``targets``
        are (B, G) from teacher scores. With ``own_only`` each query has its own negatives only.
        """
        compute = self._compute_no_in_batch_neg_loss if own_only else self._compute_in_batch_neg_loss
        compute = partial(compute, teacher_targets=targets)
        (query_dense, query_sparse, query_vectors), (passage_dense, passage_sparse, passage_vectors) = query, passage
        sparse_scores, sparse_loss = compute(query_sparse, passage_sparse, compute_score_func=self.compute_sparse_score)
        colbert_scores, colbert_loss = compute(
            query_vectors, passage_vectors, compute_score_func=self.compute_colbert_score, q_mask=query_mask
        )
        dense_scores = self.compute_dense_score(query_dense, passage_dense)  # (B, B·G)
        if own_only:
            dense_scores = self.get_local_score(query_dense, passage_dense, dense_scores)  # (B, G)
        summed = self.ensemble_score(None, None, dense_scores, sparse_scores, colbert_scores)
        if own_only:
            # FlagEmbedding's helper would look for the groups' scores among all; these are the groups' already.
            summed_loss = self._group_loss(summed, targets)
        else:
            _, summed_loss = compute(query_dense, passage_dense, compute_score_func=lambda q, p: summed)
        loss = (dense_loss + summed_loss + 0.1 * sparse_loss + colbert_loss) / 4
        if self.use_self_distill and self.step > self.self_distill_start_step:
            teacher = summed.detach().softmax(-1)
            kinds = (dense_scores, sparse_scores, colbert_scores)
            dense, sparse, colbert = (self.distill_loss("kl_div", teacher, scores) for scores in kinds)
            loss = (loss + (dense + 0.1 * sparse + colbert) / 3) / 2
        terms = {"sparse": sparse_loss, "colbert": colbert_loss, "summed": summed_loss}
        return loss, {name: term.detach() for name, term in terms.items()}

    @staticmethod
    def distill_loss(
        kd_loss_type: str, teacher_targets: Tensor, student_scores: Tensor, group_size: int | None = None
    ) -> Tensor:
        """FlagEmbedding's distillation loss, whose ``m3_kd_loss`` fails on scores (B, G) of each query's own group."""
        if kd_loss_type != "m3_kd_loss" or student_scores.shape[1] != group_size:
            return EncoderOnlyEmbedderM3Model.distill_loss(kd_loss_type, teacher_targets, student_scores, group_size)
        # Each passage against those after it, weighted by its target.
        terms = [student_scores[:, i:].log_softmax(-1)[:, 0] * teacher_targets[:, i] for i in range(group_size)]
        return -torch.stack(terms).sum(0).mean()

    def _group_loss(self, scores: Tensor, targets: Tensor | None) -> Tensor:
        """Loss of scores (B, G) of each query's own group, the positive first, with or without teacher targets."""
        positive = torch.zeros(scores.shape[0], dtype=torch.long, device=scores.device)
        if targets is None:
            return self.compute_loss(scores, positive)
        loss = self.distill_loss(self.kd_loss_type, targets, scores, group_size=scores.shape[1])
        return loss + self.compute_loss(scores, positive) if self.kd_loss_type == "kl_div" else loss

    def _dense_embedding(self, last_hidden_state: Tensor, attention_mask: Tensor) -> Tensor:
        return pool(last_hidden_state, attention_mask, self.sentence_pooling_method)

    def _dist_gather_tensor(self, t: Tensor | None) -> Tensor | None:
        # The stock version lets no gradient back to the other processes, and so trains at 1 / processes of the rate.
        return None if t is None else gather_rows(t)[0]

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """The name by which transformers 5.20 and later asks for gradient checkpointing."""
        self.model.activation_checkpointing_enable(**kwargs)

    def save(self, output_dir: str) -> None:
        """Not used: the trainer saves the encoder as a model folder."""
        raise NotImplementedError("use clpl_moe.encoder.save_encoder")


# Comes before FlagEmbedding's abstract class, after which FSDP2 could not give the model a class of its own.
_Module: Any = type("_Module", (nn.Module,), {"__module__": __name__})


class CLPLModel(_Module, UnifiedModel):
    """FlagEmbedding's M3 model with CLPL as its dense loss.

    Unified fine-tuning, self-distillation and teacher scores work as in FlagEmbedding; the penalty concerns the dense
    embeddings. With teacher scores, FlagEmbedding's distillation takes the place of the contrastive term.

    Args:
        base_model: ``model``, ``colbert_linear`` and ``sparse_linear``, as FlagEmbedding's ``get_model`` returns them.
        loss: of the dense embeddings. A batch that asks for each query's own negatives only gets the loss without in-batch
            negatives, otherwise with the options that ``dense_loss``, its attribute, has at that moment.
        mask_duplicates: whether passages that are known to answer a query are left out of its negatives.
        grad_cache_tokens: in training, embed the texts in chunks of so many tokens with gradient caching; None: all at
            once. Not together with unified fine-tuning or ``sub_batch_size``.
        kwargs: further arguments of FlagEmbedding's model.
    """

    def __init__(
        self,
        base_model: dict[str, nn.Module | None],
        *,
        loss: CLPLLoss,
        settings: EmbeddingSettings,
        mask_duplicates: bool = True,
        balance_loss_weight: float = 0.0,
        z_loss_weight: float = 0.0,
        grad_cache_tokens: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            base_model,
            temperature=loss.temperature,
            sentence_pooling_method=settings.pooling,
            normalize_embeddings=settings.normalize,
            **kwargs,
        )
        self.dense_loss = loss
        self.mask_duplicates = mask_duplicates
        self.balance_loss_weight = balance_loss_weight
        self.z_loss_weight = z_loss_weight
        self.grad_cache_tokens = grad_cache_tokens
        if has_experts(self.model):
            track_routers(self.model)

    def forward(
        self,
        queries: Features | None = None,
        passages: Features | None = None,
        teacher_scores: list[float] | None = None,
        no_in_batch_neg_flag: bool = False,
        negative_queries: Features | None = None,
        negative_index: Tensor | None = None,
        passage_ids: Tensor | None = None,
        query_ids: Tensor | None = None,
        answer_ids: Tensor | None = None,
        answer_index: Tensor | None = None,
        texts: PackedTexts | None = None,
        query_rows: Tensor | None = None,
        passage_rows: Tensor | None = None,
        negative_query_rows: Tensor | None = None,
    ) -> CLPLModelOutput:
        """Loss and terms of one batch as :class:`clpl_moe.data.collator.CLPLCollator` makes it, padded or packed.

        In unified fine-tuning batches must be padded: sparse and multi-vector losses need the states in rows.
        """
        if has_experts(self.model):
            track_routers(self.model)  # forgets what a pass left that failed
        if texts is not None:
            if self.unified_finetuning:
                raise ValueError("unified_finetuning needs padded batches: set the collator's packing to False")
            embeddings = self._embed(texts)
            query, passage = (embeddings[query_rows],), (embeddings[passage_rows],)
            negative_query_dense = None if negative_query_rows is None else embeddings[negative_query_rows]
        else:
            query, passage = self.encode(queries), self.encode(passages)
            negative_query_dense = None if negative_queries is None else self.encode(negative_queries)[0]
        query_dense, passage_dense = query[0], passage[0]
        if not self.training:
            return CLPLModelOutput(q_reps=query_dense, p_reps=passage_dense)

        own_only = no_in_batch_neg_flag or not self.dense_loss.in_batch_negatives
        dense_loss = self.dense_loss
        if own_only and dense_loss.in_batch_negatives:
            dense_loss = dataclasses.replace(
                dense_loss, in_batch_negatives=False, gather_across_devices=False, same_tower_negatives=False
            )
        if not self.mask_duplicates:
            passage_ids = answer_ids = answer_index = None
        self.no_negatives = ()
        if passage_ids is not None and (teacher_scores is not None or self.unified_finetuning):
            answers = None if answer_ids is None or answer_index is None else (answer_ids, answer_index)
            self.no_negatives = self._find_no_negatives(len(query_dense), passage_ids, negative_index, answers)
        dense = dense_loss(
            query_dense,
            passage_dense,
            negative_queries=negative_query_dense,
            negative_index=negative_index,
            passage_ids=passage_ids,
            query_ids=query_ids if self.mask_duplicates and dense_loss.same_tower_negatives else None,
            answer_ids=answer_ids,
            answer_index=answer_index,
        )
        loss, terms = dense.loss, dense.terms()
        targets = teacher_targets(teacher_scores, query_dense)
        if targets is not None:
            weights = dense_loss.weights_of_dimensions(query_dense.shape[1])
            parts = {d: (truncated(query_dense, d), truncated(passage_dense, d)) for d in weights}
            of_parts = [w * self.distillation_loss(*parts[d], targets, own_only) for d, w in weights.items()]
            distillation = torch.stack(of_parts).sum()
            # In place of the contrastive term; the others stay. FlagEmbedding gives its mean over queries only, so that
            # it cannot be weighted for each query, as the contrastive term is.
            loss = sum(dense.added, start=distillation)
            terms["distillation"] = distillation.detach()
        if self.unified_finetuning:
            mask = self._get_queries_attention_mask(queries)
            loss, unified_terms = self.unified_loss(
                loss, query, passage, query_mask=mask, targets=targets, own_only=own_only
            )
            terms |= unified_terms
        router = pop_router_terms(self.model) if has_experts(self.model) else None
        if router is not None:
            loss = loss + self.balance_loss_weight * router.balance + self.z_loss_weight * router.z
            terms |= {"balance": router.balance.detach(), "z": router.z.detach(), "expert_load": router.load}
        return CLPLModelOutput(loss=loss, terms=terms)

    def _find_no_negatives(
        self, number: int, ids: Tensor, negative_index: Tensor | None, answers: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, ...]:
        """Masks of what is no negative of a batch's queries, among this process's passages and among those of all."""
        own = torch.arange(number, device=ids.device) * (len(ids) // number)
        rows = own if negative_index is None else torch.cat([own, negative_index])

        def mask(ids: Tensor, offset: int) -> Tensor:
            found = find_no_negatives(ids, offset + rows, answers)[:number]
            return found.scatter(1, (offset + own).unsqueeze(1), False)

        masks = [mask(ids, 0)]
        if self.negatives_cross_device:
            masks.append(gather_rows(mask(*gather_rows(ids)).to(torch.uint8))[0].bool())
        return tuple(masks)

    def _embed(self, texts: PackedTexts) -> Tensor:
        """Dense embeddings (n, D) of packed texts; in training with gradient caching, where it is on."""

        def embed(part: PackedTexts) -> Tensor:
            return embed_packed(
                self.model, part, pooling=self.sentence_pooling_method, normalize=self.normalize_embeddings
            )

        if self.grad_cache_tokens is None or not self.training:
            return embed(texts)

        def embed_chunk(rows: list[int]) -> tuple[Tensor, ...]:
            return embed(texts.select(rows)), *(take_router_records(self.model) if has_experts(self.model) else ())

        chunks = chunks_by_tokens(texts.lengths.tolist(), self.grad_cache_tokens)
        embeddings, *records = cached_forward(self.model, embed_chunk, chunks)
        if records:
            put_router_records(self.model, *records)
        order = torch.tensor([row for rows in chunks for row in rows]).argsort()
        return embeddings[send(order, embeddings.device)]


def teacher_targets(scores: list[float] | None, like: Tensor) -> Tensor | None:
    """A teacher's scores of B·G passages as probabilities (B, G), on the device of the queries ``like`` (B, D)."""
    if scores is None:
        return None
    values = send(torch.tensor(scores, dtype=torch.float32), like.device)
    return F.softmax(values.view(like.shape[0], -1), dim=-1)
