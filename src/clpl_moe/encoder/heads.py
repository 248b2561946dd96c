"""BGE-M3's sparse and multi-vector heads in a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clpl_moe.common.errors import UserError, at

HEAD_FILES = ("sparse_linear.pt", "colbert_linear.pt")  # as FlagEmbedding names them


def find_heads(path: str | Path, **hub: Any) -> dict[str, str]:
    """Where the sparse and multi-vector heads of a folder or hub model lie on this disk, by file name; those it has.

    Raises:
        UserError: there is no such folder, and the hub gives no answer.
    """
    from huggingface_hub import errors, hf_hub_download

    if Path(path).is_dir():
        return {name: str(Path(path) / name) for name in HEAD_FILES if (Path(path) / name).is_file()}
    found = {}
    for name in HEAD_FILES:
        try:
            found[name] = hf_hub_download(str(path), name, **hub)
        except (errors.EntryNotFoundError, errors.HFValidationError, OSError) as error:  # HTTP errors are OSErrors
            if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
                continue
            raise UserError(
                f"{at(path)}: neither a folder here nor a model that the hub gives, so that it cannot be told whether"
                f" there are sparse and multi-vector heads ({', '.join(HEAD_FILES)}); check the spelling and the network"
            ) from None
    return found


def read_head(file: str) -> dict[str, Tensor]:
    """A head's ``weight`` (C, D) and ``bias`` (C,), on the CPU; :class:`UserError` where a file is not of a head."""
    try:
        head = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise errors of many kinds
        raise UserError(f"{at(file)}: the head cannot be read ({type(error).__name__})") from None
    weight, bias = (head.get("weight"), head.get("bias")) if isinstance(head, dict) else (None, None)
    if isinstance(weight, Tensor) and isinstance(bias, Tensor) and weight.dim() == 2 and bias.shape == weight.shape[:1]:
        return {"weight": weight, "bias": bias}
    raise UserError(f"{at(file)}: not a head, expected the weight and the bias of a Linear layer")
