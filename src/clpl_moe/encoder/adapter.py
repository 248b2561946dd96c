"""Adapters (LoRA): a few trained weights beside a base model that stays as it is, in the format of peft.

An adapter's folder has peft's ``adapter_config.json``, which names the base model, and ``adapter_model.safetensors``. Where
experts were put into the base model, ``moe_config.json`` has the fields of their ``MoEConfig``. It has no ``config.json``,
since transformers would take the folder for a whole model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from clpl_moe.common.errors import UserError, at, type_name
from clpl_moe.common.files import read_json, share, write_json
from clpl_moe.encoder.weights import find_file, read_tensors
from clpl_moe.moe.install import has_experts

CONFIG_FILE, WEIGHTS_FILE, MOE_FILE = "adapter_config.json", "adapter_model.safetensors", "moe_config.json"
_PREFIX = "base_model.model."  # of every name in the file: where peft's own model holds the base model


@dataclass
class AdapterFolder:
    """An adapter's files on this disk, and what it belongs to."""

    folder: Path
    base: str  # the base model: a folder, or a name on the hub
    revision: str | None  # of the base model
    moe: dict[str, Any] | None  # experts that were put into the base model


def find_adapter(path: str | Path, **hub: Any) -> AdapterFolder | None:
    """The adapter in a folder or a hub model; None where there is a whole model, or none. :class:`UserError` where it names no
    base model."""
    path = str(path)
    if (file := find_file(path, CONFIG_FILE, hub)) is None or find_file(path, "config.json", hub) is not None:
        return None
    values = read_json(Path(file), dict)
    base, revision = values.get("base_model_name_or_path"), values.get("revision")
    if not isinstance(base, str) or not base or Path(base).resolve() == Path(path).resolve():
        raise UserError(
            f"{at(file, field='base_model_name_or_path')}: found {base!r}, expected the base model of the adapter"
        )
    if not isinstance(revision, str | None):
        raise UserError(f"{at(file, field='revision')}: found {type_name(revision)}, expected a string or null")
    find_file(path, WEIGHTS_FILE, hub)  # from the hub it comes into the same folder
    experts = find_file(path, MOE_FILE, hub)
    moe = None if experts is None else read_json(Path(experts), dict)
    return AdapterFolder(Path(file).parent, base, revision or None, moe)


def whole_model(path: str | Path, hub: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Folder or hub name of a model, of an adapter that of its base model, and what the hub is asked with."""
    if (adapter := find_adapter(path, **hub)) is None:
        return str(path), hub
    return whole_model(adapter.base, hub | {"revision": adapter.revision})


def described_by(path: str | Path, hub: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Folder or hub name that has a model's settings, tokenizer and heads, and what the hub is asked with: the model's own, or
    of an adapter as peft writes it, without them, its base model's."""
    path = str(path)
    if find_file(path, "modules.json", hub) is not None or (adapter := find_adapter(path, **hub)) is None:
        return path, hub
    return described_by(adapter.base, hub | {"revision": adapter.revision})


def has_adapter(model: nn.Module) -> bool:
    """Whether peft has put adapters into a model."""
    return bool(vars(model).get("peft_config"))


def adapter_config(model: nn.Module) -> Any:
    """The configuration of a model's adapter, a ``peft.PeftConfig``; ValueError where it has several."""
    configs: Mapping[str, Any] = vars(model)["peft_config"]
    if len(configs) > 1:
        raise ValueError(f"found the adapters {', '.join(configs)}, expected one: merge or delete the others")
    return next(iter(configs.values()))


def adapter_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model's adapter by their names in the file, not copied: changing them changes the model."""
    from peft import get_peft_model_state_dict

    (name,) = vars(model)["peft_config"]
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {_PREFIX + key.removeprefix(_PREFIX): tensor for key, tensor in state.items()}


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Write a model's adapter, so that ``peft.PeftModel.from_pretrained`` loads it onto the base model; ValueError for the folder
    of that."""
    config = copy.copy(adapter_config(model))
    base = str(config.base_model_name_or_path or model.name_or_path or "")
    if base and Path(base).resolve() == folder.resolve():
        raise ValueError(f"{folder} holds the base model, which the adapter needs: save it into another folder")
    # A folder is found from wherever the adapter is loaded.
    config.base_model_name_or_path = str(Path(base).resolve()) if base and Path(base).is_dir() else base
    config.inference_mode = True
    if isinstance(getattr(config, "target_modules", None), set):  # which peft makes of a list
        config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(folder))
    file = folder / WEIGHTS_FILE
    save_file({k: v.detach().cpu().contiguous() for k, v in adapter_weights(model).items()}, file, {"format": "pt"})
    share(file)
    # Of another model that lay here, which would be loaded instead.
    for name in ("config.json", *(() if has_experts(model) else (MOE_FILE,))):
        (folder / name).unlink(missing_ok=True)
    if has_experts(model):
        write_json(folder / MOE_FILE, model.config.moe)


def load_adapter_weights(model: nn.Module, folder: str | Path) -> None:
    """Put the weights of a folder's adapter into a model's; in place; :class:`UserError` where names or shapes differ."""
    file = Path(folder, WEIGHTS_FILE)
    if not file.is_file():
        raise UserError(f"{at(file)}: no such file, expected the weights of an adapter")
    own, found = adapter_weights(model), read_tensors(str(file))
    for name in sorted(own.keys() | found.keys()):
        here, there = (tuple(s[name].shape) if name in s else "nothing" for s in (own, found))
        if here != there:
            raise UserError(f"{at(file)}: found {there} for '{name}', expected {here}: it does not fit this model")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(found[name])


def mixed_adapter(state: Mapping[str, Tensor], base: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """The weights of an adapter, by their names in its file, that make ``(1 - alpha) · base + alpha · tuned`` of a model, where the
    whole adapter makes the tuned one of ``base``: what it adds is scaled, and what is trained whole is mixed."""

    def mixed(name: str, tensor: Tensor) -> Tensor:
        if "lora_B" in name:
            return alpha * tensor
        whole = base.get(name.removeprefix(_PREFIX))
        return tensor if whole is None else torch.lerp(whole.to(tensor), tensor, alpha)

    return {name: mixed(name, tensor) for name, tensor in state.items()}


def merge_adapter(model: PreTrainedModel, adapter: AdapterFolder) -> None:
    """Add an adapter to the weights of its base model; in place. Raises :class:`UserError` where it does not fit, and what peft
    raises."""
    from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig

    config = PeftConfig.from_pretrained(str(adapter.folder))
    with torch.random.fork_rng(devices=[]):  # of the first weights, which are replaced
        adapted = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type](model, config, "default")
    load_adapter_weights(model, adapter.folder)
    adapted.merge_and_unload()
    model.requires_grad_(True)  # as a loaded model is
