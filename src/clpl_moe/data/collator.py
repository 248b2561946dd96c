"""From examples to tokens: queries, passages and negative queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from clpl_moe.data.dataset import Example, TextIds
from clpl_moe.data.flag_embedding import AbsEmbedderCollator
from clpl_moe.encoder.cut import cut_texts
from clpl_moe.encoder.packing import PackedTexts


@dataclass
class CLPLCollator(AbsEmbedderCollator):
    """Tokenises a batch; negative queries get the length of queries.

    With ``packing`` all texts of the step are one :class:`PackedTexts`; texts that are equal after prompts and truncation
    come once, share their dropout, and count once in the routers' losses. ``pad_to_multiple_of`` and ``sub_batch_size``
    have no effect then. ``negatives_cross_device``: whether the loss sees passages of other processes.
    """

    packing: bool = False
    negatives_cross_device: bool = False

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        """Batch B examples of group size G with M negative queries.

        Returns:
            ``negative_index``: (M,) int64, for each negative query the row of the passage that answers it, or None;
            ``passage_ids``: (B·G,) int64, equal for equal texts, in every process, -1 where a text only fills up a group;
            ``query_ids``: (B + M,) likewise, of the queries, then the negative queries; ``answer_ids`` and ``answer_index``,
            (K,) int64 or None: more passages that are known to answer a query, and its row in ``query_ids``;
            ``teacher_scores``: B·G numbers, or None; ``no_in_batch_neg_flag``: as in FlagEmbedding. Besides, padded:
            ``queries`` and ``passages``, token tensors (B, L) and (B·G, L'), or lists of them with ``sub_batch_size``; ``negative_queries``, (M, L'') likewise, or None. Packed: ``texts``, with
            neighbours of equal length, and for each query, passage and negative query its number there, int64:
            ``query_rows`` (B,), ``passage_rows`` (B·G,), ``negative_query_rows`` (M,) or None.
        """
        passages: list[str] = []
        negative_queries: list[str] = []
        negative_index: list[int] = []
        for example in examples:
            for row, known in enumerate(example.negative_queries, len(passages) + 1):
                negative_queries += known
                negative_index += [row] * len(known)
            passages += example.passages
        scores = None
        if examples[0].teacher_scores is not None:
            scores = [score for example in examples for score in example.teacher_scores or ()]
        queries = [example.query for example in examples]
        tokens = self._pack if self.packing else self._pad
        texts = tokens(queries, passages, negative_queries)
        if self.packing and examples[0].expert is not None:
            texts["texts"].experts = _experts_of_texts(examples, texts)
        return texts | {
            "negative_index": torch.tensor(negative_index) if negative_queries else None,
            **self._ids([example.text_ids() for example in examples]),
            "teacher_scores": scores,
            "no_in_batch_neg_flag": not all(example.in_batch_negatives for example in examples),
        }

    def _ids(self, examples: list[TextIds]) -> dict[str, torch.Tensor | None]:
        passages = [number for ids in examples for number in ids.passages]
        queries = [ids.query for ids in examples]
        queries += [number for ids in examples for some in ids.negative_queries for number in some]
        answers = [ids.answers[0] for ids in examples] + [known for ids in examples for known in ids.answers[1:]]
        if not self.negatives_cross_device:
            of_batch = set(passages)
            answers = [known & of_batch for known in answers]
        pairs = [(number, row) for row, known in enumerate(answers) for number in sorted(known)]
        return {
            "passage_ids": torch.tensor(passages),
            "query_ids": torch.tensor(queries),
            "answer_ids": torch.tensor([number for number, _ in pairs]) if pairs else None,
            "answer_index": torch.tensor([row for _, row in pairs]) if pairs else None,
        }

    def _pack(self, queries: list[str], passages: list[str], negative_queries: list[str]) -> dict[str, Any]:
        ids = self._cut(queries + negative_queries, self.query_max_len)["input_ids"]
        sequences = [tuple(text) for text in ids + self._cut(passages, self.passage_max_len)["input_ids"]]
        unique = sorted(set(sequences), key=lambda ids: (len(ids), ids))
        number = {ids: row for row, ids in enumerate(unique)}
        rows = torch.tensor([number[ids] for ids in sequences])
        query_rows, negative_query_rows, passage_rows = rows.split([len(queries), len(negative_queries), len(passages)])
        return {
            "texts": PackedTexts.from_sequences(unique),
            "query_rows": query_rows,
            "passage_rows": passage_rows,
            "negative_query_rows": negative_query_rows if negative_queries else None,
        }

    def _cut(self, texts: list[str], max_length: int) -> Any:
        return self.tokenizer(cut_texts(self.tokenizer, texts, max_length), truncation=True, max_length=max_length)

    def _pad(self, queries: list[str], passages: list[str], negative_queries: list[str]) -> dict[str, Any]:
        return {
            "queries": self._tokenise(queries, self.query_max_len),
            "passages": self._tokenise(passages, self.passage_max_len),
            "negative_queries": self._tokenise(negative_queries, self.query_max_len) if negative_queries else None,
        }

    def _tokenise(self, texts: list[str], max_length: int) -> Any:
        how = {"pad_to_multiple_of": self.pad_to_multiple_of, "return_tensors": self.return_tensors}
        # Before it is split: the model joins the sub-batches' multi-vector embeddings again.
        padded = self.tokenizer.pad(self._cut(texts, max_length), padding=self.padding, **how)
        size = self.sub_batch_size
        if not size or size < 0:
            return padded
        return [{name: rows[i : i + size] for name, rows in padded.items()} for i in range(0, len(texts), size)]


def _experts_of_texts(examples: list[Example], packed: dict[str, Any]) -> torch.Tensor:
    """The expert of each packed text, (n,) int64: its example's. A text of several examples has the last one's."""
    experts = torch.empty(len(packed["texts"]), dtype=torch.int64)
    for name, counts in (
        ("query_rows", [1] * len(examples)),
        ("negative_query_rows", [sum(map(len, example.negative_queries)) for example in examples]),
        ("passage_rows", [len(example.passages) for example in examples]),
    ):
        if packed[name] is not None:
            given = torch.tensor([example.expert for example in examples])
            experts[packed[name]] = given.repeat_interleave(torch.tensor(counts))
    return experts
