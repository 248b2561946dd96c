"""Load an encoder: a stock model, a folder with experts, an adapter with its base model, or a checkpoint of 2024."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from clpl_moe.common.compressed import refuse_pointer
from clpl_moe.common.errors import UserError, at, one_line
from clpl_moe.common.files import read_json
from clpl_moe.common.options import refuse_revision_of_folder
from clpl_moe.encoder.adapter import AdapterFolder, described_by, find_adapter, merge_adapter
from clpl_moe.encoder.folder import TRUST, check_config
from clpl_moe.encoder.hub import asked
from clpl_moe.encoder.settings import remember_stated
from clpl_moe.encoder.weights import find_file, no_bar_of_weights, read_weights, weight_names
from clpl_moe.moe.config import MoEConfig
from clpl_moe.moe.inject import has_experts, inject_moe, stack_2024_experts
from clpl_moe.moe.modeling_clpl_moe import MOE_CLASSES


def load_encoder(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    cache_dir: str | None = None,
    token: str | None = None,
    revision: str | None = None,
    tokenizer: str | Path | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load an encoder and its tokenizer (or that of ``tokenizer``) from a folder or by its name on the hub, there of a
    ``revision`` (commit, branch or tag; None: the newest).

    Folders with experts load without remote code, also those of 2024 (``config.json`` with ``moe``, ``num_experts`` and
    ``num_experts_per_tok``), whose router becomes ``topk_softmax``. Of an adapter (LoRA) the base model is loaded, and the
    adapter added to its weights; tokenizer and settings that its folder lacks are the base model's. A pooling layer is kept only
    where the weights hold one. The model is in evaluation mode, in ``dtype``, on the CPU. It remembers the settings and the length that its folder
    states, for ``save_encoder`` and :class:`~clpl_moe.encoder.encoder.Encoder`. A ``path`` where nothing is found, or nothing
    that can be loaded, raises :class:`UserError`.
    """
    hub = {"cache_dir": cache_dir, "token": token, "revision": revision}
    path = str(path)
    config = read_config(path, **hub)
    model_type = config.get("model_type", "")
    moe_class = {_model_type(c): c for c in MOE_CLASSES.values()}.get(model_type)
    adapter = find_adapter(path, **hub)
    keys = weight_names(path, hub) if adapter is None else []
    if adapter is not None:
        model = _load_with_adapter(path, adapter, trust_remote_code, hub)
    elif is_2024_checkpoint(config) and any(".dense.experts." in key for key in keys):
        model = _load_2024(path, config, hub)
    else:
        kwargs: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code, **asked(hub, path)}
        if kwargs.get("local_files_only"):  # the lowest version asks the hub for an adapter otherwise
            kwargs["adapter_kwargs"] = {"local_files_only": True}
        if model_type in {_model_type(c) for pair in MOE_CLASSES.items() for c in pair}:
            kwargs["add_pooling_layer"] = any(".pooler." in f".{key}" for key in keys)
        with refuse_unloadable(path, "encoder", trust_remote_code), no_bar_of_weights():
            if moe_class is not None:
                del kwargs["trust_remote_code"]
            loaded: Any = (moe_class or AutoModel).from_pretrained(path, output_loading_info=True, **kwargs)
            model, info = loaded
        if missing := sorted(info["missing_keys"]):
            raise UserError(
                f"{at(path)}: the weights lack {len(missing)} parameters of the model, first '{missing[0]}'"
            )
    remember_stated(model, path, **hub)
    model.to(dtype)  # type: ignore[arg-type]
    named, hub = tokenizer_of(path, tokenizer, hub)
    with refuse_unloadable(named, "tokenizer", trust_remote_code):
        loaded_tokenizer = AutoTokenizer.from_pretrained(
            named, trust_remote_code=trust_remote_code, **asked(hub, named)
        )
        try_tokenizer(loaded_tokenizer)
    return model.eval(), loaded_tokenizer


def tokenizer_of(path: str, tokenizer: str | Path | None, hub: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Folder or hub name of a model's tokenizer, or of another one, and what the hub is asked with."""
    if tokenizer is not None:
        return str(tokenizer), hub | {"revision": None}  # it is the model's
    if any(find_file(path, name, hub) for name in ("tokenizer_config.json", "tokenizer.json")):
        return path, hub
    return described_by(path, hub)


def try_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise what a tokenizer raises that was read from damaged files, some of which it meets as it is used only, and
    ValueError for one without words, which transformers makes of a folder that lacks its files."""
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError("found no vocabulary, expected tokenizer.json, or the vocabulary of the tokenizer's kind")
    tokens = tokenizer(["a", "b c"], truncation=True, max_length=8)
    if tokenizer.pad_token is not None:
        tokenizer.pad(tokens)
    if not isinstance(tokenizer.model_max_length, int | float):
        raise TypeError(f"model_max_length is {tokenizer.model_max_length!r}, expected a number")


def read_config(path: str | Path, **hub: Any) -> dict[str, Any]:
    """The ``config.json`` of a folder or of a model on the hub, of an adapter the base model's with the experts that were put
    into it; raises :class:`UserError` where there is none."""
    refuse_revision_of_folder(path, hub.get("revision"))
    if not str(path):
        raise UserError("found an empty name of a model, expected a folder or a name on the hub")
    file = find_file(str(path), "config.json", hub)
    if file is None and (adapter := find_adapter(path, **hub)) is not None:
        return _config_with_adapter(path, adapter, hub)
    if file is None:
        if Path(path).exists():
            found = "no config.json" if Path(path).is_dir() else "found a file"
            raise UserError(f"{at(path)}: {found}, expected a model folder")
        raise not_found(path, hub)
    return check_config(read_json(file, dict), at(file))


def is_nowhere(name: str, hub: dict[str, Any], *files: str) -> bool:
    """Whether neither this disk nor the hub has a model of this name, known by any of the ``files``."""
    return not Path(name).exists() and not any(find_file(name, file, hub) for file in files)


def not_found(path: str | Path, hub: dict[str, Any]) -> UserError:
    """What to raise where neither this disk nor the hub has a model of this name."""
    revision = f" at revision {hub['revision']}" if hub.get("revision") else ""
    return UserError(
        f"{at(path)}: neither a folder here nor a model that could be fetched from the hub{revision}; check the spelling,"
        " the network and, for gated models, HF_TOKEN"
    )


def _config_with_adapter(path: str | Path, adapter: AdapterFolder, hub: dict[str, Any]) -> dict[str, Any]:
    with _of_adapter(path, adapter):
        config = read_config(adapter.base, **hub | {"revision": adapter.revision})
    if adapter.moe is None or isinstance(config.get("moe"), dict):
        return config
    types = {_model_type(dense): _model_type(moe) for dense, moe in MOE_CLASSES.items()}
    if config.get("model_type") not in types:
        raise UserError(f"{at(path)}: its base model is a {config.get('model_type')!r}, which can have no experts")
    return config | {"model_type": types[config["model_type"]], "moe": adapter.moe}


def _load_with_adapter(path: str, adapter: AdapterFolder, trusted: bool, hub: dict[str, Any]) -> PreTrainedModel:
    with _of_adapter(path, adapter):
        base = hub | {"revision": adapter.revision}
        model, _ = load_encoder(adapter.base, trust_remote_code=trusted, **base)
    if adapter.moe is not None and not has_experts(model):
        try:
            with torch.random.fork_rng(devices=[]):  # of the routers' first weights, which are replaced
                inject_moe(model, MoEConfig(**adapter.moe))
        except (TypeError, ValueError) as error:
            raise UserError(f"{at(path)}: experts of the adapter cannot be put into the base model: {error}") from None
    with refuse_unloadable(path, "adapter", trusted):
        merge_adapter(model, adapter)
    model.name_or_path = path  # its weights are no longer the base model's
    return model


@contextlib.contextmanager
def _of_adapter(path: str | Path, adapter: AdapterFolder) -> Iterator[None]:
    """Say of what the model is the base that is not found or cannot be loaded."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{at(path)}: an adapter, whose base model cannot be loaded: {error}") from None


def is_2024_checkpoint(config: dict[str, Any]) -> bool:
    """Whether a ``config.json`` is of the 2024 format: experts under a stock model type."""
    return "num_experts_per_tok" in config and not isinstance(config.get("moe"), dict)


def _load_2024(path: str, config: dict[str, Any], hub: dict[str, Any]) -> PreTrainedModel:
    dense_class = {_model_type(c): c for c in MOE_CLASSES}.get(config.get("model_type", ""))
    if dense_class is None:
        raise UserError(f"{at(path)}: model_type is {config.get('model_type')!r}, expected 'xlm-roberta'")
    state = stack_2024_experts(read_weights(path, hub))
    targets = [t for t in ("intermediate", "output") if any(k.endswith(f".{t}.router.weight") for k in state)]
    if len(targets) != 1:
        raise UserError(f"{at(path)}: found experts in {targets or 'no layer'}, expected intermediate or output ones")
    layers = sorted({int(k.split(".layer.")[1].split(".")[0]) for k in state if k.endswith(".router.weight")})
    try:
        moe = MoEConfig(
            num_experts=config.get("num_experts", 2),
            top_k=config.get("num_experts_per_tok", 1),
            target=targets[0],
            layers="all" if len(layers) == config.get("num_hidden_layers") else layers,
            router="topk_softmax",
        )
    except ValueError as error:
        raise UserError(f"{at(path)}: {error}") from None
    moe_class = MOE_CLASSES[dense_class]
    own = ("model_type", "moe", "num_experts", "num_experts_per_tok", "only_train")
    known = {k: v for k, v in config.items() if k not in own}
    pooler = any(name.startswith("pooler.") for name in state)
    state.pop("embeddings.position_ids", None)
    assert moe_class.config_class is not None
    try:
        model = moe_class(moe_class.config_class.from_dict({**known, "moe": moe.to_dict()}), add_pooling_layer=pooler)
        model.load_state_dict(state)
    except Exception as error:
        fault = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{at(path)}: the weights do not fit config.json: {fault}") from error
    model.config.architectures = [moe_class.__name__]
    return model


def _model_type(model_class: type[PreTrainedModel]) -> str:
    assert model_class.config_class is not None
    return model_class.config_class.model_type


@contextlib.contextmanager
def refuse_unloadable(path: str, what: str, trusted: bool) -> Iterator[None]:
    """Turn every error of loading ``what`` into a :class:`UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises plain ones
        if not trusted and "trust_remote_code" in str(error):
            raise UserError(f"{at(path)}: the model needs code from its own folder; {TRUST}") from error
        for file in sorted(file for file in Path(path).glob("*") if file.is_file()):
            refuse_pointer(file)
        fault = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{at(path)}: the {what} cannot be loaded: {fault}") from error
