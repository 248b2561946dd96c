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

    Args:
        model: the encoder; with experts, one of the classes that can be saved (XLM-R, RoBERTa, BERT).
        tokenizer: its tokenizer.
        folder: is created where it does not exist; files of the same names are replaced.
        settings: pooling and prompts. None: those of the folder that :func:`load_encoder` read the model from, otherwise
            BGE-M3's.
        max_length: longest input in tokens, as sentence-transformers truncates it. None: as that folder states, otherwise
            the tokenizer's limit; no more than the model's positions.
        heads: state dicts to write as ``sparse_linear.pt`` and ``colbert_linear.pt``, by file name.
        heads_from: folder or hub name of the base model; heads that ``heads`` does not name are copied from it.
        state_dict: weights to write instead of the model's own (gathered from several devices, for instance).

    Raises:
        ValueError: the encoder has experts but is of a class that cannot be loaded again, or those of a folder's own code.
        UserError: it cannot be told whether ``heads_from`` has heads, since the hub is out of reach; or ``settings`` is None
            and those of the model's folder cannot be computed. Nothing is written.
    """
    encoder = Encoder(model, tokenizer, settings, max_length)
    if heads_from is not None and not set(HEAD_FILES) <= set(heads or {}):
        encoder.head_files = find_heads(heads_from)
    encoder.save(folder, heads=heads, state_dict=state_dict)
