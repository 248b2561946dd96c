"""The model that training optimises: an encoder, FlagEmbedding's heads, CLPL, and the routers' losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from FlagEmbedding.abc.finetune.embedder import EmbedderOutput
from FlagEmbedding.finetune.embedder.encoder_only.m3 import EncoderOnlyEmbedderM3Model
from torch import Tensor, nn
from torch.nn import functional as F

from clpl_moe.encoder.settings import EmbeddingSettings, pool
from clpl_moe.loss import CLPLLoss, CLPLOutput, gather_rows
from clpl_moe.moe.balance import pop_router_terms, put_router_records, take_router_records, track_routers
from clpl_moe.moe.inject import expert_parameters, ffn_parameters, has_experts
from clpl_moe.training.grad_cache import cached_forward, chunks_by_tokens

Features = dict[str, Tensor] | list[dict[str, Tensor]]


@dataclass
class CLPLModelOutput(EmbedderOutput):
    """``loss`` with a graph, and the terms by name, detached scalars (``expert_load``: (L, N))."""

    terms: dict[str, Tensor] | None = None


class CLPLModel(EncoderOnlyEmbedderM3Model):
    """FlagEmbedding's M3 model with CLPL as its dense loss.

    Unified fine-tuning, self-distillation and teacher scores work as in FlagEmbedding; the penalty concerns the dense
    embeddings. With teacher scores, FlagEmbedding's distillation takes the place of the contrastive term.

    Args:
        base_model: ``model``, ``colbert_linear`` and ``sparse_linear``, as FlagEmbedding's ``get_model`` returns them.
        loss: CLPL's settings for batches with in-batch negatives as configured.
        settings: pooling and normalisation.
        mask_duplicates: whether negatives with the positive's text are left out.
        balance_loss_weight, z_loss_weight: of the routers' losses.
        grad_cache_tokens: in training, embed the texts in chunks of so many tokens with gradient caching; None: all at
            once. Not together with unified fine-tuning or ``sub_batch_size``.
        kwargs: further arguments of FlagEmbedding's model.
    """

    def __init__(
        self,
        base_model: dict[str, nn.Module],
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
        self.own_negatives_loss = CLPLLoss(
            loss.temperature,
            loss.penalty_weight,
            in_batch_negatives=False,
            false_negative_margin=loss.false_negative_margin,
            normalize=loss.normalize,
        )
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
    ) -> CLPLModelOutput:
        """Loss and terms of one batch as :class:`clpl_moe.data.collator.CLPLCollator` makes it."""
        if self.grad_cache_tokens is not None and self.training:
            query_dense, passage_dense, negative_dense = self._encode_cached(queries, passages, negative_queries)
        else:
            query_dense, query_sparse, query_colbert = self.encode(queries)
            passage_dense, passage_sparse, passage_colbert = self.encode(passages)
            negative_dense = None if negative_queries is None else self.encode(negative_queries)[0]
        if not self.training:
            return CLPLModelOutput(q_reps=query_dense, p_reps=passage_dense)

        own_only = no_in_batch_neg_flag or not self.dense_loss.in_batch_negatives
        dense = (self.own_negatives_loss if own_only else self.dense_loss)(
            query_dense,
            passage_dense,
            negative_queries=negative_dense,
            negative_index=negative_index,
            passage_ids=passage_ids if self.mask_duplicates else None,
        )
        loss, terms = dense.loss, _named_terms(dense)
        if teacher_scores is not None or self.unified_finetuning:
            targets = self._teacher_targets(teacher_scores, query_dense)
            dense_scores, contrastive = self._stock_loss(own_only)(
                query_dense,
                passage_dense,
                teacher_targets=targets,
                compute_score_func=self.compute_dense_score,
            )
            if targets is not None:
                # The penalty's part stays, distillation takes the place of the contrastive part.
                loss = contrastive + dense.loss - dense.contrastive
                terms["distillation"] = contrastive.detach()
            if self.unified_finetuning:
                loss, unified_terms = self._unified_loss(
                    loss,
                    dense_scores,
                    (query_sparse, query_colbert),
                    (passage_sparse, passage_colbert),
                    targets,
                    own_only,
                    queries,
                    passage_dense,
                    query_dense,
                )
                terms |= unified_terms
        router = pop_router_terms(self.model) if has_experts(self.model) else None
        if router is not None:
            loss = loss + self.balance_loss_weight * router.balance + self.z_loss_weight * router.z
            terms |= {"balance": router.balance.detach(), "z": router.z.detach(), "expert_load": router.load}
        return CLPLModelOutput(loss=loss, terms=terms)

    def _encode_cached(self, *parts: dict[str, Tensor] | None) -> list[Tensor | None]:
        """Dense embeddings (n, D) of each part, all of them chunks of one gradient caching."""
        given = [part for part in parts if part is not None]
        features = _join_rows(given, self.tokenizer.pad_token_id, self.tokenizer.padding_side)
        lengths = features["attention_mask"].sum(1).tolist()
        chunks = chunks_by_tokens(lengths, self.grad_cache_tokens)

        def embed(rows: list[int]) -> tuple[Tensor, ...]:
            longest = max(lengths[row] for row in rows)
            kept = slice(-longest, None) if self.tokenizer.padding_side == "left" else slice(longest)
            dense = self.encode({name: values[rows, kept] for name, values in features.items()})[0]
            return dense, *(take_router_records(self.model) if has_experts(self.model) else ())

        embeddings, *records = cached_forward(self.model, embed, chunks)
        if records:
            put_router_records(self.model, *records)
        order = torch.tensor([row for rows in chunks for row in rows], device=embeddings.device)
        in_order = iter(embeddings[order.argsort()].split([part["input_ids"].shape[0] for part in given]))
        return [None if part is None else next(in_order) for part in parts]

    def _stock_loss(self, own_only: bool):
        if own_only:
            return self._compute_no_in_batch_neg_loss
        return self._compute_cross_device_neg_loss if self.negatives_cross_device else self._compute_in_batch_neg_loss

    def _teacher_targets(self, teacher_scores: list[float] | None, like: Tensor) -> Tensor | None:
        if teacher_scores is None:
            return None
        scores = torch.tensor(teacher_scores, device=like.device, dtype=torch.float32)
        return F.softmax(scores.view(like.shape[0], -1), dim=-1)  # (B, G)

    def _unified_loss(
        self,
        dense_loss: Tensor,
        dense_scores: Tensor,
        query_vectors: tuple[Tensor, Tensor],
        passage_vectors: tuple[Tensor, Tensor],
        targets: Tensor | None,
        own_only: bool,
        queries: Features,
        passage_dense: Tensor,
        query_dense: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """FlagEmbedding's joint loss of dense, sparse, multi-vector and summed scores; sparse and multi-vector scores see
        this process's passages only."""
        compute = self._compute_no_in_batch_neg_loss if own_only else self._compute_in_batch_neg_loss
        batch, rows = query_dense.shape[0], passage_dense.shape[0]
        sparse_scores, sparse_loss = compute(
            query_vectors[0],
            passage_vectors[0],
            teacher_targets=targets,
            compute_score_func=self.compute_sparse_score,
        )
        colbert_scores, colbert_loss = compute(
            query_vectors[1],
            passage_vectors[1],
            teacher_targets=targets,
            compute_score_func=self.compute_colbert_score,
            q_mask=self._get_queries_attention_mask(queries),
        )
        if not own_only and self.negatives_cross_device:
            rank = self.process_rank
            dense_scores = dense_scores[rank * batch : (rank + 1) * batch, rank * rows : (rank + 1) * rows]
        summed = self.ensemble_score(None, None, dense_scores, sparse_scores, colbert_scores)
        if own_only:
            # FlagEmbedding's helper would look for the groups' scores among all; these are the groups' already.
            summed_loss = self._group_loss(summed, targets)
        else:
            _, summed_loss = compute(
                query_dense, passage_dense, teacher_targets=targets, compute_score_func=lambda q, p: summed
            )
        loss = (dense_loss + summed_loss + 0.1 * sparse_loss + colbert_loss) / 4
        if self.use_self_distill and self.step > self.self_distill_start_step:
            teacher = summed.detach().softmax(-1)
            distilled = (
                self.distill_loss("kl_div", teacher, dense_scores)
                + 0.1 * self.distill_loss("kl_div", teacher, sparse_scores)
                + self.distill_loss("kl_div", teacher, colbert_scores)
            ) / 3
            loss = (loss + distilled) / 2
        return loss, {
            "sparse": sparse_loss.detach(),
            "colbert": colbert_loss.detach(),
            "summed": summed_loss.detach(),
        }

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


def _join_rows(parts: list[dict[str, Tensor]], pad_token_id: int, padding_side: str) -> dict[str, Tensor]:
    """Token tensors (n, L) of several parts as one, padded to the longest part's length."""
    width = max(part["input_ids"].shape[1] for part in parts)

    def widen(values: Tensor, fill: int) -> Tensor:
        missing = width - values.shape[1]
        return F.pad(values, (missing, 0) if padding_side == "left" else (0, missing), value=fill)

    return {
        name: torch.cat([widen(part[name], pad_token_id if name == "input_ids" else 0) for part in parts])
        for name in parts[0]
    }


def _named_terms(output: CLPLOutput) -> dict[str, Tensor]:
    terms = {
        "contrastive": output.contrastive,
        "penalty": output.penalty,
        "positive_similarity": output.positive_similarity,
        "negative_similarity": output.negative_similarity,
        "negative_query_similarity": output.negative_query_similarity,
    }
    if output.negative_query_similarity is None:
        del terms["penalty"]  # absent rather than 0: a mean over steps is then one over the steps that have one
    return {name: value.detach() for name, value in terms.items() if value is not None}


def choose_trainable(model: CLPLModel, trainable: str, *, fix_position_embedding: bool, fix_encoder: bool) -> None:
    """Leave gradients only where they are wanted.

    Args:
        model: changed in place.
        trainable: ``moe`` (experts and routers), ``ffn`` (all FFN Linear layers, experts and routers) or ``full``.
        fix_position_embedding: FlagEmbedding's option, freezes these too.
        fix_encoder: FlagEmbedding's option, leaves only its heads to train.

    Raises:
        ValueError: ``moe`` for a model without experts, or nothing would be trained.
    """
    encoder = model.model
    if trainable == "moe" and not has_experts(encoder):
        raise ValueError(
            "trainable is moe but the model has no experts: set num_experts to 2 or more, or trainable to full"
        )
    if trainable != "full":
        chosen = expert_parameters(encoder) if trainable == "moe" else ffn_parameters(encoder)
        encoder.requires_grad_(False)
        for _, parameter in chosen:
            parameter.requires_grad_(True)
    for name, parameter in encoder.named_parameters():
        # Nothing that is trained uses the pooling layer.
        if fix_encoder or name.startswith("pooler.") or (fix_position_embedding and "position_embeddings" in name):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("nothing would be trained: fix_encoder without unified_finetuning leaves no parameters")
