"""The contrastive learning penalty loss, as sentence-transformers' trainer takes a loss."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clpl_moe.loss.clpl import CLPLLoss
from clpl_moe.loss.grad_cache import cached_forward
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
        query, *rest = self._embed(columns)
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

    def _embed(self, columns: list[dict[str, Tensor]]) -> list[Tensor]:
        """The embeddings of each column, (B, D) each."""
        return [self.model(features)["sentence_embedding"] for features in columns]

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


class CachedSentenceTransformerCLPLLoss(SentenceTransformerCLPLLoss):
    """:class:`SentenceTransformerCLPLLoss` in the memory of ``mini_batch_size`` texts, by gradient caching.

    Loss and gradients are those of the whole batch, dropout included: each mini-batch is embedded twice, the second time
    with the random numbers of the first (:mod:`clpl_moe.loss.grad_cache`). So a step takes about a forward pass longer, and
    the batch may be as large as its embeddings and similarities allow.

    The arguments are those of :class:`SentenceTransformerCLPLLoss`, and ``mini_batch_size``, the texts of a column that are
    embedded at once. For embeddings that can be truncated set ``matryoshka_dims``: a ``MatryoshkaLoss`` around this loss is
    refused.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        temperature: float = CLPLOptions.temperature,
        penalty_weight: float = CLPLOptions.penalty_weight,
        *,
        num_negatives: int,
        query_prompt: str = "",
        mini_batch_size: int = 32,
        **options: Any,
    ) -> None:
        super().__init__(
            model, temperature, penalty_weight, num_negatives=num_negatives, query_prompt=query_prompt, **options
        )
        if not isinstance(mini_batch_size, int) or mini_batch_size < 1:
            raise ValueError(f"mini_batch_size is {mini_batch_size!r}: give a number of texts, 1 or more")
        self.mini_batch_size = mini_batch_size

    __signature__ = _with_options(inspect.signature(__init__))

    def _embed(self, columns: list[dict[str, Tensor]]) -> list[Tensor]:
        model: nn.Module = self.model
        if type(vars(model).get("forward")).__name__ == "ForwardDecorator":
            raise ValueError(
                "MatryoshkaLoss cannot be around a loss that embeds twice: set its matryoshka_dims instead"
            )
        chunks = [chunk for features in columns for chunk in _mini_batches(features, self.mini_batch_size)]
        sizes = [len(features["input_ids"]) for features in columns]

        def cached(module: nn.Module) -> Tensor:
            # A copy of the features: modules put their outputs into them.
            return cached_forward(module, lambda chunk: (module(dict(chunk))["sentence_embedding"],), chunks)[0]

        if not isinstance(model, nn.parallel.DistributedDataParallel):
            return list(cached(model).split(sizes))
        # For DistributedDataParallel all of it is one forward, whose backward gives each gradient once.
        module = model.module
        with _replaced_forward(module, lambda: cached(module)):
            return list(model().split(sizes))

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, for the model card."""
        return super().get_config_dict() | {"mini_batch_size": self.mini_batch_size}

    @property
    def citation(self) -> str:
        """BibTeX of both papers, for the model card."""
        return f"""{super().citation}
@inproceedings{{gao2021scaling,
    title={{Scaling deep contrastive learning batch size under memory limited setup}},
    author={{Luyu Gao and Yunyi Zhang and Jiawei Han and Jamie Callan}},
    year={{2021}},
    eprint={{2101.06983}},
    archivePrefix={{arXiv}},
    url={{https://arxiv.org/abs/2101.06983}},
}}
"""


@contextlib.contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[[], Tensor]) -> Iterator[None]:
    """A block in which the next call of ``module`` is ``forward``; calls within that one are the module's own again."""
    before = vars(module).get("forward")

    def restore() -> None:
        if before is None:
            vars(module).pop("forward", None)
        else:
            module.forward = before

    def once() -> Tensor:
        restore()
        return forward()

    module.forward = once
    try:
        yield
    finally:
        restore()


def _mini_batches(features: dict[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    """The features of a column (B texts) in parts of ``size`` texts, each only as wide as its longest text."""
    number, width = features["attention_mask"].shape
    for start in range(0, number, size):
        rows = slice(start, start + size)
        used = features["attention_mask"][rows].any(dim=0).nonzero()
        end = (
            int(used.max()) + 1 if len(used) else width
        )  # what stands before the first token stays: positions count it
        yield {name: _part(value, rows, end, (number, width)) for name, value in features.items()}


def _part(value: Any, rows: slice, end: int, shape: tuple[int, int]) -> Any:
    """Some rows of a feature, cut at ``end`` where it has a value for each token; whole where it is not one for each text."""
    if not isinstance(value, Tensor) or value.shape[:1] != shape[:1]:
        return value
    return value[rows, :end] if value.shape[:2] == shape else value[rows]


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
