"""Load an encoder: a stock model, a folder with experts, or a checkpoint in the format of 2024."""

from __future__ import annotations

import contextlib
import json
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from clpl_moe.common.errors import UserError, at
from clpl_moe.encoder.settings import EmbeddingSettings, read_max_length, read_settings
from clpl_moe.moe.config import MoEConfig
from clpl_moe.moe.inject import stack_2024_experts
from clpl_moe.moe.modeling_clpl_moe import MOE_CLASSES

_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True)
class Stated:
    """What the folder of a model states besides weights and tokenizer.

    Attributes:
        settings: pooling, normalisation and prompts; the defaults where it states none.
        max_length: longest input in tokens, where it states one.
        fault: what is wrong with its settings.
    """

    settings: EmbeddingSettings = field(default_factory=EmbeddingSettings)
    max_length: int | None = None
    fault: str | None = None


def stated_by_folder(model: nn.Module) -> Stated:
    """What the folder stated that :func:`load_encoder` read a model from; the defaults for other models."""
    return getattr(model, "_clpl_moe_stated", Stated())


def load_encoder(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    cache_dir: str | None = None,
    token: str | None = None,
    tokenizer: str | Path | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load an encoder and its tokenizer from a folder or by its name on the hub; the tokenizer from ``tokenizer`` where
    that is given.

    Folders with experts load without remote code, also those of 2024 (``config.json`` with ``moe``, ``num_experts`` and
    ``num_experts_per_tok``), whose router becomes ``topk_softmax``. A pooling layer is kept only where the weights hold
    one. The model is in evaluation mode, in ``dtype``, on the CPU. It remembers the settings and the length that its folder
    states, for ``save_encoder`` and :class:`~clpl_moe.encoder.encoder.Encoder`.

    Raises:
        UserError: nothing is found at ``path``, or what is there cannot be loaded.
    """
    hub = {"cache_dir": cache_dir, "token": token}
    path = str(path)
    config = read_config(path, **hub)
    model_type = config.get("model_type")
    moe_class = {c.config_class.model_type: c for c in MOE_CLASSES.values()}.get(model_type)
    keys = _weight_names(path, hub)
    if is_2024_checkpoint(config) and any(".dense.experts." in key for key in keys):
        model = _load_2024(path, config, hub)
    else:
        kwargs: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code, **hub}
        pooling_types = {c.config_class.model_type for pair in MOE_CLASSES.items() for c in pair}
        if model_type in pooling_types:
            kwargs["add_pooling_layer"] = any(".pooler." in f".{key}" for key in keys)
        with refuse_unloadable(path, "encoder", trust_remote_code), no_bar_of_weights():
            if moe_class is not None:
                del kwargs["trust_remote_code"]
                model, info = moe_class.from_pretrained(path, output_loading_info=True, **kwargs)
            else:
                model, info = AutoModel.from_pretrained(path, output_loading_info=True, **kwargs)
        if missing := sorted(info["missing_keys"]):
            raise UserError(
                f"{at(path)}: the weights lack {len(missing)} parameters of the model, first '{missing[0]}'"
            )
    model._clpl_moe_stated = _read_stated(path, hub)
    return model.to(dtype).eval(), _load_tokenizer(str(tokenizer or path), trust_remote_code, hub)


def _read_stated(path: str, hub: dict[str, Any]) -> Stated:
    try:
        return Stated(read_settings(path, **hub), read_max_length(path, **hub))
    except UserError as error:  # concerns only those who use the settings
        return Stated(fault=str(error))


@contextlib.contextmanager
def no_bar_of_weights() -> Iterator[None]:
    """Load or save without transformers' bar, which lasts a moment; bars of downloads stay."""
    if not transformers_logging.is_progress_bar_enabled():
        yield
        return
    downloads = not are_progress_bars_disabled()
    with warnings.catch_warnings():  # where the environment decides on bars of downloads
        warnings.simplefilter("ignore")
        transformers_logging.disable_progress_bar()
        if downloads:
            enable_progress_bars()
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            transformers_logging.enable_progress_bar()
            if not downloads:
                disable_progress_bars()


def load_weights(model: PreTrainedModel, path: str | Path) -> None:
    """Put the weights of a model folder into an encoder of the same shape; in place, exactly.

    Raises:
        UserError: names or shapes differ from the model's.
    """
    try:
        model.load_state_dict(_state_dict(str(path), {}))
    except RuntimeError as error:
        first = " ".join(str(error).split("\n")[:2]).replace("\t", "")  # a line for each weight
        raise UserError(f"{at(path)}: the weights do not fit this model: {first}") from None


def read_config(path: str | Path, **hub: Any) -> dict[str, Any]:
    """The ``config.json`` of a folder or of a model on the hub; raises :class:`UserError` where there is none."""
    file = find_file(str(path), "config.json", hub)
    if file is None:
        if Path(path).exists():
            raise UserError(f"{at(path)}: no config.json, expected a model folder")
        raise UserError(
            f"{at(path)}: neither a folder here nor a model that could be fetched from the hub; check the spelling, the"
            " network and, for gated models, HF_TOKEN"
        )
    try:
        config = json.loads(Path(file).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{at(file)}: not JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{at(file)}: expected a JSON object")
    return config


def is_2024_checkpoint(config: dict[str, Any]) -> bool:
    """Whether a ``config.json`` is of the 2024 format: experts under a stock model type."""
    return "num_experts_per_tok" in config and not isinstance(config.get("moe"), dict)


def _load_2024(path: str, config: dict[str, Any], hub: dict[str, Any]) -> PreTrainedModel:
    dense_class = {c.config_class.model_type: c for c in MOE_CLASSES}.get(config.get("model_type"))
    if dense_class is None:
        raise UserError(f"{at(path)}: model_type is {config.get('model_type')!r}, expected 'xlm-roberta'")
    state = stack_2024_experts(_state_dict(path, hub))
    targets = [t for t in ("intermediate", "output") if any(k.endswith(f".{t}.router.weight") for k in state)]
    if len(targets) != 1:
        raise UserError(f"{at(path)}: found experts in {targets or 'no layer'}, expected intermediate or output ones")
    layers = sorted({int(k.split(".layer.")[1].split(".")[0]) for k in state if k.endswith(".router.weight")})
    num_layers = config.get("num_hidden_layers")
    try:
        moe = MoEConfig(
            num_experts=config.get("num_experts", 2),
            top_k=config.get("num_experts_per_tok", 1),
            target=targets[0],
            layers="all" if len(layers) == num_layers else layers,
            router="topk_softmax",
        )
    except ValueError as error:
        raise UserError(f"{at(path)}: {error}") from None
    moe_class = MOE_CLASSES[dense_class]
    known = {k: v for k, v in config.items() if k not in ("moe", "num_experts", "num_experts_per_tok", "only_train")}
    known.pop("model_type")
    pooler = any(name.startswith("pooler.") for name in state)
    state.pop("embeddings.position_ids", None)
    try:
        model = moe_class(moe_class.config_class.from_dict({**known, "moe": moe.to_dict()}), add_pooling_layer=pooler)
        model.load_state_dict(state)
    except Exception as error:
        raise UserError(f"{at(path)}: the weights do not fit config.json: {_describe(error)}") from error
    model.config.architectures = [moe_class.__name__]
    return model


def _load_tokenizer(path: str, trust_remote_code: bool, hub: dict[str, Any]) -> PreTrainedTokenizerBase:
    with refuse_unloadable(path, "tokenizer", trust_remote_code):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, **hub)


@contextlib.contextmanager
def refuse_unloadable(path: str, what: str, trusted: bool) -> Iterator[None]:
    """Whatever a damaged or foreign folder brings about, while ``what`` is loaded from it, as a :class:`UserError`."""
    try:
        yield
    except Exception as error:  # the tokenizers library raises plain ones
        if not trusted and "trust_remote_code" in str(error):
            raise UserError(
                f"{at(path)}: the model needs code from its own folder; look at that code, and if you trust it, pass"
                " --trust_remote_code true (trust_remote_code=True in Python)"
            ) from error
        raise UserError(f"{at(path)}: the {what} cannot be loaded: {_describe(error)}") from error


def find_file(path: str, name: str, hub: dict[str, Any] | None = None) -> str | None:
    """Where a file of a folder or of a hub model lies on this disk; None where it cannot be had."""
    if Path(path).is_dir():
        file = Path(path) / name
        return str(file) if file.is_file() else None
    try:
        return cached_file(path, name, _raise_exceptions_for_missing_entries=False, **(hub or {}))
    except (OSError, ValueError):
        return None


# BGE-M3's sparse and multi-vector heads, as FlagEmbedding names their files.
HEAD_FILES = ("sparse_linear.pt", "colbert_linear.pt")


def find_heads(path: str | Path, **hub: Any) -> dict[str, str]:
    """Where the sparse and multi-vector heads of a folder or hub model lie on this disk, by file name; those it has.

    Raises:
        UserError: it cannot be told whether there are heads: no such folder, and the hub gives no answer.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    if Path(path).is_dir():
        return {name: str(Path(path) / name) for name in HEAD_FILES if (Path(path) / name).is_file()}
    found = {}
    for name in HEAD_FILES:
        try:
            found[name] = hf_hub_download(str(path), name, **hub)
        except (EntryNotFoundError, HFValidationError, OSError) as error:  # HTTP errors are OSErrors
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                continue
            raise UserError(
                f"{at(path)}: neither a folder here nor a model that the hub gives, so that it cannot be told whether"
                f" there are sparse and multi-vector heads ({', '.join(HEAD_FILES)}); check the spelling and the network"
            ) from None
    return found


def read_head(file: str) -> dict[str, Tensor]:
    """A head's ``weight`` (C, D) and ``bias`` (C,) from one of the files that :func:`find_heads` finds; on the CPU.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        head = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file brings about
        raise UserError(f"{at(file)}: the head cannot be read ({type(error).__name__})") from None
    weight, bias = (head.get("weight"), head.get("bias")) if isinstance(head, dict) else (None, None)
    tensors = isinstance(weight, Tensor) and isinstance(bias, Tensor)
    if not tensors or weight.dim() != 2 or bias.shape != weight.shape[:1]:
        raise UserError(f"{at(file)}: not a head, expected the weight and the bias of a Linear layer")
    return {"weight": weight, "bias": bias}


def _weight_file(path: str, hub: dict[str, Any]) -> str:
    for name in _WEIGHT_FILES:
        if (file := find_file(path, name, hub)) is not None:
            return file
    raise UserError(f"{at(path)}: no weights, expected one of {', '.join(_WEIGHT_FILES)}")


def _weight_names(path: str, hub: dict[str, Any]) -> list[str]:
    file = _weight_file(path, hub)
    return list(_weight_map(file)) if file.endswith(".json") else list(_read_weights(file, names_only=True))


def _state_dict(path: str, hub: dict[str, Any]) -> dict[str, Tensor]:
    file = _weight_file(path, hub)
    if not file.endswith(".json"):
        return _read_weights(file)
    state: dict[str, Tensor] = {}
    for shard in sorted(set(_weight_map(file).values())):
        state.update(_read_weights(find_file(path, shard, hub) or str(Path(path) / shard)))
    return state


def _weight_map(file: str) -> dict[str, str]:
    """Name of each weight and of the file that holds it, from the index of weights in several files."""
    try:
        return dict(json.loads(Path(file).read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{at(file)}: no index of weights ({_describe(error)})") from None


def _read_weights(file: str, names_only: bool = False) -> dict[str, Any]:
    try:
        if file.endswith(".safetensors"):
            from safetensors import safe_open

            with safe_open(file, framework="pt") as tensors:
                return {key: None if names_only else tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
        # Files of before torch 1.6 are no archives and cannot be mapped.
        return torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
    except Exception as error:
        raise UserError(f"{at(file)}: the weights cannot be read: {_describe(error)}") from error


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
