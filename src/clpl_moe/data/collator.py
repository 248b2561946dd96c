"""From examples to token tensors: queries, passages, and the queries that negatives answer."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from FlagEmbedding.abc.finetune.embedder import AbsEmbedderCollator

from clpl_moe.data.dataset import Example


@dataclass
class CLPLCollator(AbsEmbedderCollator):
    """Tokenises a batch; the queries of negatives are treated as queries (their length, not the passages')."""

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        """Batch B examples of group size G with M queries of negatives.

        Returns:
            ``queries`` and ``passages``: token tensors (B, L) and (B·G, L'), or lists of them with ``sub_batch_size``;
            ``negative_queries``: (M, L'') likewise, or None; ``negative_index``: (M,) int64, the row of ``passages`` that
            each of them answers, or None; ``passage_ids``: (B·G,) int64, equal for equal texts, in every process;
            ``teacher_scores``: B·G numbers, or None; ``no_in_batch_neg_flag``: as in FlagEmbedding.
        """
        passages = [text for example in examples for text in example.passages]
        negative_queries, negative_index = [], []
        row = 0
        for example in examples:
            for place, queries in enumerate(example.negative_queries, 1):
                negative_queries += queries
                negative_index += [row + place] * len(queries)
            row += len(example.passages)
        scores = None
        if examples[0].teacher_scores is not None:
            scores = [score for example in examples for score in example.teacher_scores]
        return {
            "queries": self._tokenise([example.query for example in examples], self.query_max_len),
            "passages": self._tokenise(passages, self.passage_max_len),
            "negative_queries": self._tokenise(negative_queries, self.query_max_len) if negative_queries else None,
            "negative_index": torch.tensor(negative_index) if negative_queries else None,
            "passage_ids": torch.tensor([text_id(text) for text in passages]),
            "teacher_scores": scores,
            "no_in_batch_neg_flag": not all(example.in_batch_negatives for example in examples),
        }

    def _tokenise(self, texts: list[str], max_length: int) -> Any:
        tokens = self.tokenizer(texts, truncation=True, max_length=max_length)
        # Before it is split: the model joins the sub-batches' multi-vector embeddings again.
        padded = self.tokenizer.pad(
            tokens, padding=self.padding, pad_to_multiple_of=self.pad_to_multiple_of, return_tensors=self.return_tensors
        )
        size = self.sub_batch_size
        if not size or size < 0:
            return padded
        return [
            {name: values[start : start + size] for name, values in padded.items()}
            for start in range(0, len(texts), size)
        ]


def text_id(text: str) -> int:
    """A number below 2⁶³ that stands for a text, the same in every process and run."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
