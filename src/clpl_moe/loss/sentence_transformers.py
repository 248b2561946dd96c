"""The contrastive learning penalty loss, as sentence-transformers' trainer takes a loss."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clpl_moe.loss.clpl import CLPLLoss
from clpl_moe.loss.options import CLPLOptions

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def _with_options(signature: inspect.Signature) -> inspect.Signature:
    """A constructor's signature with the loss's options in place of its last parameter."""
    _, *own, _ = signature.parameters.values()
    names = {parameter.name for parameter in own}
    shared = inspect.signature(CLPLOptions).parameters.values()
    return signature.replace(parameters=[*own, *(p for p in shared if p.name not in names)])


class SentenceTransformerCLPLLoss(nn.Module):
    """:class:`~clpl_moe.loss.CLPLLoss` of the columns of a data set.

    Args:
        model: a text model: empty texts and equal ones are told by their tokens.
        temperature: divides the similarities in the contrastive term.
        penalty_weight: λ, the share of the penalty.
        num_negatives: how many columns of negatives there are; the trainer hands columns over without names.
        query_prompt: the prompt that the training arguments' ``prompts`` put before the columns of negative
            queries. Needed to tell the empty ones.
        options: ``in_batch_negatives``, ``false_negative_margin`` and the others of :class:`~clpl_moe.loss.CLPLLoss`.
            ``matryoshka_dims`` take the place of a ``MatryoshkaLoss`` around this one, and are computed with one gathering.
            A passage of the text of a query's positive is never one of its negatives, nor is what answers an equal query
            of the batch.

    Inputs:
        Columns of text in this order, whatever their names; there are no labels.

        =====================================  ========================================================
        anchor                                 the query
        positive                               its positive passage
        negative_1, …, negative_n              its hard negatives
        negative_query_1, …, negative_query_n  a query that each negative answers, or ``""``; optional,
                                               and again any number of times
        =====================================  ========================================================

    ``BatchSamplers.NO_DUPLICATES`` is not needed, and does harm where several rows have empty strings.

    Example:
        ::

            train = Dataset.from_dict({
                "anchor": ["who wrote it?", "when was it built?"],
                "positive": ["She wrote it in 1922.", "It was built in 1889."],
                "negative_1": ["He read it in 1930.", "It was painted in 1968."],
                "negative_query_1": ["when did he read it?", ""],
            })
            loss = SentenceTransformerCLPLLoss(model, num_negatives=1)
            SentenceTransformerTrainer(model=model, train_dataset=train, loss=loss).train()
    """

    def __init__(
        self,
        model: SentenceTransformer,
        temperature: float = CLPLOptions.temperature,
        penalty_weight: float = CLPLOptions.penalty_weight,
        *,
        num_negatives: int,
        query_prompt: str = "",
        **options: Any,
    ) -> None:
        super().__init__()
        if not isinstance(num_negatives, int) or num_negatives < 0:
            raise ValueError(f"num_negatives is {num_negatives!r}: give the number of columns of negatives")
        self.model = model
        self.num_negatives = num_negatives
        self.query_prompt = query_prompt
        self.loss = CLPLLoss(temperature, penalty_weight, **options)
        dimension_of = getattr(model, "get_embedding_dimension", None) or model.get_sentence_embedding_dimension
        if (whole := dimension_of()) is not None:  # the second is the name before version 6
            self.loss.check_dimensions(whole)
        preprocess = getattr(model, "preprocess", None) or model.tokenize  # the name before version 6
        self._empty = _token_ids(preprocess([query_prompt]))[0]

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """The loss of a batch; ``sentence_features`` holds the features of each column."""
        columns = list(sentence_features)
        group = 1 + self.num_negatives
        query_columns = columns[1 + group :]
        rounds_fit = len(query_columns) % self.num_negatives == 0 if self.num_negatives else not query_columns
        if len(columns) < 1 + group or not rounds_fit:
            raise ValueError(
                f"found {len(columns)} columns, with num_negatives={self.num_negatives} expected {1 + group}"
                f" (anchor, positive, negatives), or these and {self.num_negatives} more for each round of"
                " negative queries"
            )
        if any(("prompt_length" in features) != bool(self.query_prompt) for features in query_columns):
            found = f"a column of negative queries comes {'without' if self.query_prompt else 'with'} a prompt"
            raise ValueError(
                f"query_prompt is {self.query_prompt!r}, but {found}: empty queries could not be told, give the loss the"
                " prompt that the trainer puts before these columns"
            )
        query_ids, *passage_ids = [_token_ids(features) for features in columns[: 1 + group]]  # G lists of B
        negative_query_ids = [_token_ids(features) for features in query_columns]
        given = [[ids != self._empty for ids in column] for column in negative_query_ids]
        query, *rest = (self.model(features)["sentence_embedding"] for features in columns)  # (B, D) each
        batch, device = query.shape[0], query.device
        passages = torch.stack(rest[:group], dim=1).flatten(0, 1)  # (B·G, D)
        # Texts of the same tokens are the same to the model; hashes of integers are equal in all processes.
        ids = torch.tensor([hash(ids) for row in zip(*passage_ids) for ids in row], device=device)  # (B·G,)
        known = [ids for row in zip(*negative_query_ids) for ids in row if ids != self._empty]
        of_queries = torch.tensor([hash(ids) for ids in query_ids + known], device=device)  # (B + M,)
        if not query_columns:
            rows = torch.arange(batch, device=device) * group
            return self.loss(query, passages, **_with_answers(ids, of_queries, rows)).loss
        mask = torch.tensor(given, device=device).T  # (B, columns)
        # The column's negative by its place in the group, and by its row of the passages.
        negative = torch.arange(len(query_columns), device=device) % self.num_negatives + 1  # (columns,)
        index = torch.arange(batch, device=device).unsqueeze(1) * group + negative  # (B, columns)
        negative_queries = torch.stack(rest[group:], dim=1)[mask]  # (M, D)
        rows = torch.cat([torch.arange(batch, device=device) * group, index[mask]])
        return self.loss(query, passages, negative_queries, index[mask], **_with_answers(ids, of_queries, rows)).loss

    # What signature() shows in place of ``**options``.
    __signature__ = _with_options(inspect.signature(__init__))

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, for the model card."""
        return asdict(self.loss) | {"num_negatives": self.num_negatives, "query_prompt": self.query_prompt}

    @property
    def citation(self) -> str:
        """BibTeX of the paper, for the model card."""
        return """
@misc{yu2024efficient,
    title={Efficient fine-tuning methodology of text embedding models for information retrieval:
        contrastive learning penalty (clp)},
    author={Jeongsu Yu},
    year={2024},
    eprint={2412.17364},
    archivePrefix={arXiv},
    url={https://arxiv.org/abs/2412.17364},
}
"""


def _with_answers(ids: Tensor, query_ids: Tensor, rows: Tensor) -> dict[str, Tensor]:
    """The ids of passages and queries, (P,) and (B + M,), and what answers a query since it answers an equal one. ``rows``
    (B + M,) are the passages that answer the queries."""
    which, equal = torch.nonzero(query_ids.unsqueeze(1) == query_ids, as_tuple=True)
    return {"passage_ids": ids, "query_ids": query_ids, "answer_ids": ids[rows[equal]], "answer_index": which}


def _token_ids(features: dict[str, Tensor]) -> list[tuple[int, ...]]:
    """The tokens of each text of a column, without padding."""
    if "input_ids" not in features or "attention_mask" not in features:
        raise ValueError(
            f"the model's features are {', '.join(features)}: input_ids and attention_mask are needed to tell"
            " empty negative queries and equal passages (is it a text model, and is unpad_inputs off?)"
        )
    rows = zip(features["input_ids"].tolist(), features["attention_mask"].tolist())
    return [tuple(token for token, real in zip(*row) if real) for row in rows]
