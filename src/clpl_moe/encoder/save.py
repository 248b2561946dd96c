"""The two-argument form of saving: a model and its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from clpl_moe.encoder.encoder import Encoder
from clpl_moe.encoder.heads import HEAD_FILES, find_heads
from clpl_moe.encoder.settings import EmbeddingSettings


def save_encoder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    settings: EmbeddingSettings | None = None,
    *,
    max_length: int | None = None,
    heads: Mapping[str, Mapping[str, Tensor]] | None = None,
    heads_from: str | Path | None = None,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Write a model folder that every tool of the field loads: :meth:`Encoder.save` for a model and a tokenizer.

    ``model``, ``tokenizer``, ``settings`` and ``max_length`` are :class:`Encoder`'s, the others :meth:`Encoder.save`'s, but
    ``heads_from``: folder or hub name of the base model, from which heads that ``heads`` does not name are copied.

    Raises:
        ValueError: the encoder has experts but is of a class that cannot be loaded again, or those of a folder's own code.
        UserError: it cannot be told whether ``heads_from`` has heads, since the hub is out of reach; or ``settings`` is None
            and those of the model's folder cannot be computed. Nothing is written.
    """
    encoder = Encoder(model, tokenizer, settings, max_length)
    if heads_from is not None and not set(HEAD_FILES) <= set(heads or {}):
        encoder.head_files = find_heads(heads_from)
    encoder.save(folder, heads=heads, state_dict=state_dict)
