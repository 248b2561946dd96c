"""Sparse and multi-vector heads of a base model: read to be kept, or made to be trained."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import nn

from clpl_moe.common.errors import UserError, at
from clpl_moe.encoder.heads import HEAD_FILES, find_heads, read_head

logger = logging.getLogger(__name__)


def read_heads(path: str, *, required: bool, **hub: str | None) -> dict[str, dict[str, torch.Tensor]]:
    """The weights of the sparse and multi-vector heads that a base model has, by file name.

    Args:
        path: folder or hub name.
        required: whether they are trained, so that it must be known if there are any.
        hub: ``cache_dir`` and ``token``.

    Raises:
        UserError: a file is not a head, or the hub gives no answer although ``required``; otherwise that is warned of.
    """
    try:
        files = find_heads(path, **hub)
    except UserError as error:
        if required:
            raise
        logger.warning("%s. The folders of this run will have none: only dense embeddings will be of use", error)
        return {}
    return {name: read_head(file) for name, file in files.items()}


def make_heads(
    weights: dict[str, dict[str, torch.Tensor]], path: str, hidden_size: int, colbert_dim: int
) -> dict[str, nn.Linear]:
    """The heads of a base model as modules, new ones where it has none.

    Raises:
        UserError: the base model's heads have other shapes.
    """
    widths = {"sparse_linear.pt": 1, "colbert_linear.pt": colbert_dim if colbert_dim > 0 else hidden_size}
    heads = {}
    for name in HEAD_FILES:
        head = heads[Path(name).stem] = nn.Linear(hidden_size, widths[name])
        if name not in weights:
            logger.warning("%s has no %s: training begins with a new one", path, name)
            continue
        try:
            head.load_state_dict(weights[name])
        except RuntimeError as error:
            raise UserError(
                f"{at(path)}: {name} does not fit a head of {hidden_size} to {widths[name]}: {error}"
            ) from None
    return heads
