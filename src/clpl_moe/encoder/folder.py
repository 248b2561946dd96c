"""The JSON files of a model folder or hub model, checked before any library acts on them.

A folder may be damaged, or made to deceive: libraries meet a wrong type somewhere inside, and some run the Python that a
folder names.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from clpl_moe.common.errors import UserError, at, shorten
from clpl_moe.common.files import read_json

logger = logging.getLogger(__name__)

TRUST = "look at that code, and if you trust it, set trust_remote_code to true"


class _Kind(NamedTuple):
    """What a field may hold."""

    expected: str
    holds: Callable[[Any], bool]


def _whole(most: int) -> _Kind:
    return _Kind(f"a whole number from 1 to {most}", lambda value: type(value) is int and 1 <= value <= most)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _are_prompts(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(isinstance(item, str | None) for item in value.values()))


_TEXT = _Kind("a string", lambda value: isinstance(value, str))
_FLAG = _Kind("true or false", lambda value: isinstance(value, bool))
_OBJECT = _Kind("an object", lambda value: isinstance(value, dict))
_TEXTS = _Kind("a list of strings", lambda value: value is None or _are_texts(value))

_CONFIG = {"model_type": _TEXT, "architectures": _TEXTS, "auto_map": _OBJECT}
# Of the encoders that this package builds itself. Others may have a list of sizes, one a layer.
_SIZES = {
    **dict.fromkeys(("hidden_size", "max_position_embeddings"), _whole(2**20)),
    **dict.fromkeys(("intermediate_size", "vocab_size"), _whole(2**24)),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "type_vocab_size"), _whole(2**10)),
    **dict.fromkeys(("num_experts", "num_experts_per_tok"), _whole(2**10)),
    "pad_token_id": _Kind("a whole number or null", lambda value: value is None or type(value) is int),
    "moe": _Kind("an object or a string", lambda value: isinstance(value, dict | str | None)),
}
_OWN_TYPES = ("xlm-roberta", "roberta", "bert", "clpl_moe_xlm_roberta", "clpl_moe_roberta", "clpl_moe_bert")
_MODULE = {"type": _TEXT, "path": _TEXT}
_MODULE_CONFIG = {
    "pooling_mode": _Kind("a string or a list of strings", lambda value: isinstance(value, str) or _are_texts(value)),
    "include_prompt": _FLAG,
    "activation_function": _TEXT,
}
_DESCRIPTION = {"prompts": _Kind("an object of strings", _are_prompts)}

# What sentence-transformers may be asked to load: of its own modules these import nothing that a folder names.
_MODULES = ("Transformer", "Pooling", "Normalize", "Dense", "LogitScore", "Dropout", "LayerNorm")
# Where a Transformer module says what is handed to transformers, in the order in which they are looked for; and what of that
# neither runs nor unpickles anything, as "weights_only": false would.
_OF_TRANSFORMER = [
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]
_HANDED_ON = [f"{what}_{kind}" for what in ("model", "tokenizer", "processor", "config") for kind in ("args", "kwargs")]
_HARMLESS = {"dtype", "torch_dtype", "add_pooling_layer", "padding_side", "model_max_length", "max_length", "use_fast"}
_ACTIVATION = re.compile(r"torch\.nn\.(modules\.(activation|linear)\.)?\w+")


def check_config(config: dict[str, Any], place: str) -> dict[str, Any]:
    """Give the content of a ``config.json`` back; raises :class:`UserError` where a field is of a wrong type or size."""
    _check(config, _CONFIG, place)
    if config.get("model_type") in _OWN_TYPES:
        _check(config, _SIZES, place)
    return config


def read_modules(folder: str | Path, hub: Mapping[str, str | None]) -> list[dict[str, Any]] | None:
    """``modules.json``, each module an object; None where there is none."""
    modules = read_file(folder, "modules.json", list, hub)
    place = at(Path(folder, "modules.json"))
    for module in modules or []:
        if not isinstance(module, dict):
            raise UserError(f"{place}: found a {type(module).__name__} among the modules, expected objects")
        _check(module, _MODULE, place)
    return modules


def read_module_config(folder: str | Path, module: Mapping[str, Any], hub: Mapping[str, str | None]) -> dict[str, Any]:
    """A module's ``config.json``; empty where there is none."""
    name = f"{module.get('path')}/config.json"
    config = read_file(folder, name, dict, hub) or {}
    _check(config, _MODULE_CONFIG, at(Path(folder, name)))
    return config


def read_description(folder: str | Path, hub: Mapping[str, str | None]) -> dict[str, Any]:
    """``config_sentence_transformers.json``; empty where there is none."""
    name = "config_sentence_transformers.json"
    description = read_file(folder, name, dict, hub) or {}
    _check(description, _DESCRIPTION, at(Path(folder, name)))
    return description


def _check(record: dict[str, Any], fields: Mapping[str, _Kind], place: str) -> None:
    for name, kind in fields.items():
        if name in record and not kind.holds(record[name]):
            found = shorten(repr(record[name]), 60)
            raise UserError(f"{place}: field '{name}': found {found}, expected {kind.expected}")


def refuse_own_code(folder: str | Path, hub: Mapping[str, str | None]) -> None:
    """Raise :class:`UserError` where loading a folder by another library could run Python that it names or holds.

    Some versions of sentence-transformers run the modules of a local folder without being told to trust it.
    """
    for module in read_modules(folder, hub) or []:
        kind = module.get("type", "")
        package, _, name = kind.rpartition(".")
        if package.split(".")[0] != "sentence_transformers" or name not in _MODULES:
            raise UserError(
                f"{at(Path(folder, 'modules.json'))}: the module '{kind}' is none of sentence-transformers' usual ones, and"
                f" its code would run; {TRUST}"
            )
        if name == "Dense":
            name = f"{module.get('path')}/config.json"
            _check_activation(read_module_config(folder, module, hub).get("activation_function"), folder, name)
        elif name == "Transformer":
            _check_transformer(folder, module.get("path", ""), hub)
    _check_transformer(folder, "", hub)
    _check_activation(read_description(folder, hub).get("activation_fn"), folder, "config_sentence_transformers.json")


def _check_transformer(folder: str | Path, path: str, hub: Mapping[str, str | None]) -> None:
    """Of the files that describe the model at a path within a folder."""
    within = f"{path}/" if path else ""
    name = f"{within}config.json"
    config = read_file(folder, name, dict, hub) or {}
    check_config(config, at(Path(folder, name)))
    described = config.get("sentence_transformers")
    own = described.get("activation_fn") if isinstance(described, dict) else None
    for activation in (own, config.get("sbert_ce_default_activation_function")):
        _check_activation(activation, folder, name)
    for name in (f"{within}{name}" for name in _OF_TRANSFORMER):
        if handing := read_file(folder, name, dict, hub):
            _check_handed_on(handing, at(Path(folder, name)))
            break  # the others are not looked at


def _check_handed_on(config: dict[str, Any], place: str) -> None:
    for field in _HANDED_ON:
        given = config.get(field) or {}
        for name in given if isinstance(given, dict) else [given]:
            if not (isinstance(name, str) and name in _HARMLESS):
                raise UserError(
                    f"{at(place, field=field)}: found {shorten(repr(name), 60)}, which may run code; {TRUST}"
                )


def _check_activation(activation: Any, folder: str | Path, name: str) -> None:
    if activation is not None and not _ACTIVATION.fullmatch(str(activation)):
        raise UserError(
            f"{at(Path(folder, name))}: the activation {str(activation)!r} is none of torch.nn, and would be imported; {TRUST}"
        )


def read_file(folder: str | Path, name: str, kind: type, hub: Mapping[str, str | None]) -> Any:
    """A JSON file of a folder or a hub model, whose value is a ``kind``; None where there is no such file."""
    path = Path(folder, name) if Path(folder).is_dir() else _from_hub(str(folder), name, hub)
    return read_json(path, kind) if path is not None and path.is_file() else None


def _from_hub(repository: str, name: str, hub: Mapping[str, Any]) -> Path | None:
    from huggingface_hub import errors, hf_hub_download

    from clpl_moe.encoder.hub import asked

    try:
        return Path(hf_hub_download(repository, name, **asked(hub)))
    except errors.LocalEntryNotFoundError:
        logger.warning("%s of %s: the hub cannot be reached, taking the defaults", name, repository)
    # A name that is none is the business of whoever loads the weights.
    except (errors.EntryNotFoundError, errors.RepositoryNotFoundError, errors.HFValidationError):
        pass
    return None
