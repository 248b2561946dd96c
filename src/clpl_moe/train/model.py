"""The model that training optimises: an encoder, FlagEmbedding's heads, CLPL, and the routers' losses."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clpl_moe.data.flag_embedding import EmbedderOutput
from clpl_moe.encoder.packing import PackedTexts, embed_packed, send
from clpl_moe.encoder.settings import EmbeddingSettings
from clpl_moe.loss import CLPLLoss
from clpl_moe.moe.balance import pop_router_terms, put_router_records, take_router_records, track_routers
from clpl_moe.moe.inject import has_experts
from clpl_moe.train.grad_cache import cached_forward, chunks_by_tokens
from clpl_moe.train.unified import UnifiedModel, teacher_targets

Features = dict[str, Tensor] | list[dict[str, Tensor]]


@dataclass
class CLPLModelOutput(EmbedderOutput):
    """``loss`` with a graph, and the terms by name, detached scalars (``expert_load``: (L, N))."""

    terms: dict[str, Tensor] | None = None


class CLPLModel(UnifiedModel):
    """FlagEmbedding's M3 model with CLPL as its dense loss.

    Unified fine-tuning, self-distillation and teacher scores work as in FlagEmbedding; the penalty concerns the dense
    embeddings. With teacher scores, FlagEmbedding's distillation takes the place of the contrastive term.

    Args:
        base_model: ``model``, ``colbert_linear`` and ``sparse_linear``, as FlagEmbedding's ``get_model`` returns them.
        loss: of the dense embeddings. A batch that asks for each query's own negatives only gets the loss without in-batch
            negatives, otherwise with the options that ``dense_loss``, its attribute, has at that moment.
        mask_duplicates: whether negatives with the positive's text are left out.
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
        texts: PackedTexts | None = None,
        query_rows: Tensor | None = None,
        passage_rows: Tensor | None = None,
        negative_query_rows: Tensor | None = None,
    ) -> CLPLModelOutput:
        """Loss and terms of one batch as :class:`clpl_moe.data.collator.CLPLCollator` makes it, padded or packed.

        Raises:
            ValueError: a packed batch in unified fine-tuning, whose sparse and multi-vector losses need padded ones.
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
            dense_loss = dataclasses.replace(dense_loss, in_batch_negatives=False, gather_across_devices=False)
        dense = dense_loss(
            query_dense,
            passage_dense,
            negative_queries=negative_query_dense,
            negative_index=negative_index,
            passage_ids=passage_ids if self.mask_duplicates else None,
        )
        loss, terms = dense.loss, dense.terms()
        targets = teacher_targets(teacher_scores, query_dense)
        if targets is not None:
            distillation = self.distillation_loss(query_dense, passage_dense, targets, own_only)
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
