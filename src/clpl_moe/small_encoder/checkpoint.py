"""What both sources of the weights give: an encoder of BERT's form and XLM-R's tokenizer."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_LENGTH = 512  # tokens, <s> and </s> included


@dataclass(frozen=True)
class BertCheckpoint:
    """An encoder of BERT's form with its tokenizer.

    Args:
        weights: arrays by the names of ``BertModel``'s parameters.
        num_attention_heads: heads of each layer, the one size that the weights do not show.
        layer_norm_eps: epsilon of every layer norm.
        tokenizer: ``PreTrainedTokenizerBase`` with XLM-R's pieces.
        origin: where it came from, for the model card.
    """

    weights: dict[str, np.ndarray]
    num_attention_heads: int
    layer_norm_eps: float
    tokenizer: PreTrainedTokenizerBase
    origin: str


def make_tokenizer(vocabulary: list[tuple[str, float]], normalization: dict[str, str]) -> PreTrainedTokenizerBase:
    """XLM-R's tokenizer from its pieces.

    Args:
        vocabulary: pieces with their Unigram scores, the place being the id.
        normalization: what each character becomes; one that is not named stays.
    """
    from tokenizers.normalizers import Precompiled
    from transformers import XLMRobertaTokenizer

    tokenizer = XLMRobertaTokenizer(vocab=vocabulary, model_max_length=MAX_LENGTH)
    # The only normaliser that this class keeps when it is loaded again.
    tokenizer.backend_tokenizer.normalizer = Precompiled(_compile_normalization(normalization))
    return tokenizer


def _compile_normalization(normalization: dict[str, str]) -> bytes:
    """A character map in SentencePiece's compiled form."""
    import sentencepiece
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    def code_points(text: str) -> str:
        return " ".join(f"{ord(character):X}" for character in text)

    sentencepiece.set_min_log_level(1)  # silence its notes on what it reads
    with tempfile.TemporaryDirectory() as folder:
        rules = Path(folder, "rules.tsv")
        lines = (f"{code_points(old)}\t{code_points(new)}\n" for old, new in normalization.items())
        rules.write_text("".join(lines), encoding="ascii")
        normalizer = sentencepiece.SentencePieceNormalizer(rule_tsv=str(rules))
    return ModelProto.FromString(normalizer.serialized_model_proto()).normalizer_spec.precompiled_charsmap
