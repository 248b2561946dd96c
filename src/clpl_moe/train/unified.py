"""FlagEmbedding's M3 model; those of its losses that fail or train too slowly are mended here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from clpl_moe.data.flag_embedding import EncoderOnlyEmbedderM3Model
from clpl_moe.encoder.packing import send
from clpl_moe.encoder.settings import pool
from clpl_moe.loss.distributed import gather_rows


class UnifiedModel(EncoderOnlyEmbedderM3Model):
    """Unified fine-tuning, self-distillation and distillation from a teacher's scores."""

    def distillation_loss(self, query: Tensor, passages: Tensor, targets: Tensor, own_only: bool) -> Tensor:
        """FlagEmbedding's loss of the dense similarities (B, D) to (B·G, D), which are to have the teacher's ``targets``."""
        if own_only:
            compute = self._compute_no_in_batch_neg_loss
        elif self.negatives_cross_device:
            compute = self._compute_cross_device_neg_loss
        else:
            compute = self._compute_in_batch_neg_loss
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

        Args:
            dense_loss: the only part that sees other processes' passages.
            query: dense (B, D), sparse and multi-vector embeddings of the queries.
            passage: the same three of the passages, dense (B·G, D).
            query_mask: (B, L), 1 where a query's token is no padding.
            targets: (B, G) from teacher scores, or None.
            own_only: whether each query has its own negatives only.
        """
        compute = self._compute_no_in_batch_neg_loss if own_only else self._compute_in_batch_neg_loss
        query_dense, query_sparse, query_colbert = query
        passage_dense, passage_sparse, passage_colbert = passage
        sparse_scores, sparse_loss = compute(
            query_sparse, passage_sparse, teacher_targets=targets, compute_score_func=self.compute_sparse_score
        )
        colbert_scores, colbert_loss = compute(
            query_colbert,
            passage_colbert,
            teacher_targets=targets,
            compute_score_func=self.compute_colbert_score,
            q_mask=query_mask,
        )
        dense_scores = self.compute_dense_score(query_dense, passage_dense)  # (B, B·G)
        if own_only:
            dense_scores = self.get_local_score(query_dense, passage_dense, dense_scores)  # (B, G)
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


def teacher_targets(scores: list[float] | None, like: Tensor) -> Tensor | None:
    """A teacher's scores of B·G passages as probabilities (B, G), on the device of the queries ``like`` (B, D)."""
    if scores is None:
        return None
    values = send(torch.tensor(scores, dtype=torch.float32), like.device)
    return F.softmax(values.view(like.shape[0], -1), dim=-1)
