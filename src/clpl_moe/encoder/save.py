"""Save an encoder as a folder that every tool of the field loads."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from clpl_moe.encoder.load import HEAD_FILES, find_heads
from clpl_moe.encoder.settings import EmbeddingSettings, write_settings
from clpl_moe.moe.inject import refuse_foreign_experts
from clpl_moe.moe.install import has_experts
from clpl_moe.moe.modeling_clpl_moe import MOE_CLASSES


def save_encoder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    settings: EmbeddingSettings | None = None,
    *,
    max_length: int = 512,
    heads: Mapping[str, Mapping[str, Tensor]] | None = None,
    heads_from: str | Path | None = None,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Write a self-contained model folder: weights, configuration, tokenizer and sentence-transformers' files.

    With experts it also holds their code, so that ``AutoModel``, ``BGEM3FlagModel`` and ``SentenceTransformer`` load it
    with ``trust_remote_code=True``, without this package.

    Args:
        model: the encoder; with experts, one of the classes that can be saved (XLM-R, RoBERTa, BERT).
        tokenizer: its tokenizer.
        folder: is created where it does not exist; files of the same names are replaced.
        settings: pooling and prompts; the defaults are BGE-M3's.
        max_length: longest input in tokens, as sentence-transformers truncates it.
        heads: state dicts to write as ``sparse_linear.pt`` and ``colbert_linear.pt``, by file name.
        heads_from: folder or hub name of the base model; heads that ``heads`` does not name are copied from it.
        state_dict: weights to write instead of the model's own (gathered from several devices, for instance).

    Raises:
        ValueError: the encoder has experts but is of a class that cannot be loaded again, or those of a folder's own code.
        UserError: it cannot be told whether ``heads_from`` has heads, since the hub is out of reach. Nothing is written.
    """
    refuse_foreign_experts(model)
    if has_experts(model) and not isinstance(model, tuple(MOE_CLASSES.values())):
        names = ", ".join(c.__name__ for c in MOE_CLASSES)
        raise ValueError(
            f"a {type(model).__name__} with experts could not be loaded again: merge_experts(model) first, or start from"
            f" one of {names}"
        )
    heads = heads or {}
    base_heads = {} if heads_from is None or set(HEAD_FILES) <= set(heads) else find_heads(heads_from)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, state_dict=state_dict)
    tokenizer.save_pretrained(folder)
    write_settings(folder, settings or EmbeddingSettings(), max_length=max_length, hidden_size=model.config.hidden_size)
    for name in HEAD_FILES:
        if name in heads:
            torch.save({key: value.detach().cpu() for key, value in heads[name].items()}, folder / name)
        elif name in base_heads and Path(base_heads[name]).resolve() != (folder / name).resolve():
            shutil.copyfile(base_heads[name], folder / name)
