"""The weights of a model folder or hub model, in one file or several, in either format: encoder, heads, their hash."""

from __future__ import annotations

import contextlib
import hashlib
import json
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import extract_commit_hash

from clpl_moe.common.compressed import refuse_pointer
from clpl_moe.common.errors import UserError, at, one_line
from clpl_moe.common.files import read_json
from clpl_moe.encoder.hub import asked

HEAD_FILES = ("sparse_linear.pt", "colbert_linear.pt")  # of BGE-M3, as FlagEmbedding names them

_FORMATS = ("model.safetensors", "pytorch_model.bin")
_WEIGHT_FILES = [name + index for name in _FORMATS for index in ("", ".index.json")]
_WITHOUT_EFFECT = {"_name_or_path", "architectures", "auto_map", "dtype", "transformers_version", "use_cache"}


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Put a model folder's weights into a model; in place; :class:`UserError` where names or shapes differ."""
    try:
        model.load_state_dict(read_weights(str(path), {}))
    except RuntimeError as error:
        first = " ".join(str(error).split("\n")[:2]).replace("\t", "")  # a line for each weight
        raise UserError(f"{at(path)}: the weights do not fit this model: {first}") from None


def _weight_file(path: str, hub: dict[str, Any]) -> str:
    for name in _WEIGHT_FILES:
        if (file := find_file(path, name, hub)) is not None:
            return file
    raise UserError(f"{at(path)}: no weights, expected one of {', '.join(_WEIGHT_FILES)}")


def weight_names(path: str, hub: dict[str, Any]) -> list[str]:
    """The names of a model's weights, which are not read."""
    file = _weight_file(path, hub)
    return list(_weight_map(file)) if file.endswith(".json") else list(read_tensors(file, names_only=True))


def read_weights(path: str, hub: dict[str, Any]) -> dict[str, Tensor]:
    """A model's weights by name, on the CPU; :class:`UserError` where there are none, or they cannot be read."""
    file = _weight_file(path, hub)
    if not file.endswith(".json"):
        return read_tensors(file)
    state: dict[str, Tensor] = {}
    for shard in sorted(set(_weight_map(file).values())):
        state.update(read_tensors(find_file(path, shard, hub) or str(Path(path) / shard)))
    return state


def _weight_map(file: str) -> dict[str, str]:
    """Name of each weight and of the file that holds it, from the index of weights in several files."""
    found = read_json(file, dict).get("weight_map")
    if isinstance(found, dict) and all(isinstance(name, str) for name in found.values()):
        return found
    raise UserError(f"{at(file)}: no index of weights, expected an object 'weight_map' of file names")


def read_tensors(file: str, names_only: bool = False) -> dict[str, Any]:
    """The tensors of one file, or only their names; :class:`UserError` where it cannot be read."""
    try:
        if file.endswith(".safetensors"):
            with safe_open(file, framework="pt") as tensors:
                return {key: None if names_only else tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
        # Files of before torch 1.6 are no archives and cannot be mapped.
        return torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
    except Exception as error:
        refuse_pointer(file)
        fault = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{at(file)}: the weights cannot be read: {fault}") from error


def find_file(path: str, name: str, hub: dict[str, Any] | None = None) -> str | None:
    """Where a file of a folder or of a hub model lies on this disk; None where it cannot be had."""
    if Path(path).is_dir():
        file = Path(path) / name
        return str(file) if file.is_file() else None
    try:
        return cached_file(path, name, _raise_exceptions_for_missing_entries=False, **asked(hub or {}))
    except (OSError, ValueError):
        return None


def resolved_revision(path: str | Path, **hub: Any) -> str | None:
    """The commit of a model of the hub that this disk has files of; None for a folder, and where it is not known."""
    if Path(path).is_dir():
        return None
    return extract_commit_hash(find_file(str(path), "config.json", hub), None)


def find_heads(path: str | Path, **hub: Any) -> dict[str, str]:
    """Files on this disk of the heads that a model has, by name; :class:`UserError` where there is no folder and no hub."""
    from huggingface_hub import errors, hf_hub_download

    from clpl_moe.encoder.adapter import described_by

    found = {name: str(Path(path) / name) for name in HEAD_FILES if (Path(path) / name).is_file()}
    for name in () if Path(path).is_dir() else HEAD_FILES:
        try:
            found[name] = hf_hub_download(str(path), name, **asked(hub))
        except (errors.EntryNotFoundError, errors.HFValidationError, OSError) as error:  # HTTP errors are OSErrors
            if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
                continue
            raise UserError(
                f"{at(path)}: neither a folder here nor a model that the hub gives, so that it cannot be told whether"
                f" there are sparse and multi-vector heads ({', '.join(HEAD_FILES)}); check the spelling and the network"
            ) from None
    place, hub = (str(path), hub) if found else described_by(path, hub)
    return found if place == str(path) else find_heads(place, **hub)


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


def model_fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of weights, configuration and tokenizer."""
    digest = hashlib.sha256()
    config = {k: v for k, v in model.config.to_dict().items() if k not in _WITHOUT_EFFECT}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # Truncation and padding are set by each call: they are no part of the tokenizer.
        described = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("truncation", "padding")}
    else:
        described = tokenizer.get_vocab()
    digest.update(json.dumps(described, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@contextlib.contextmanager
def no_bar_of_weights() -> Iterator[None]:
    """Load or save without transformers' bar, which lasts a moment; bars of downloads stay."""
    if not transformers_logging.is_progress_bar_enabled():
        yield
        return
    downloads = not are_progress_bars_disabled()
    try:
        _set_bars(weights=False, downloads=downloads)
        yield
    finally:
        _set_bars(weights=True, downloads=downloads)


def _set_bars(weights: bool, downloads: bool) -> None:
    with warnings.catch_warnings():  # where the environment decides on bars of downloads
        warnings.simplefilter("ignore")
        # The bar of weights comes first, since it sets those of downloads, too.
        transformers_logging.enable_progress_bar() if weights else transformers_logging.disable_progress_bar()
        enable_progress_bars() if downloads else disable_progress_bars()
