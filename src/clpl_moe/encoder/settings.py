"""Pooling, normalisation, prompts and length of a model folder, pooling itself, and the checks of lengths.

The first four stand in the files of sentence-transformers, where every tool of the field looks for them. These files have two
formats; both are read, and the older one is written, since sentence-transformers 5 and 6 load it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clpl_moe.common.errors import OptionError, UserError, at
from clpl_moe.common.files import write_json
from clpl_moe.encoder.folder import read_description, read_file, read_module_config, read_modules

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Our name of a pooling -> its key in the older format of 1_Pooling/config.json, its name in the newer one.
_POOLING = {
    "cls": ("pooling_mode_cls_token", "cls"),
    "mean": ("pooling_mode_mean_tokens", "mean"),
    "last_token": ("pooling_mode_lasttoken", "lasttoken"),
}
_OLD_PREFIX = "pooling_mode_"
_STATED = "_clpl_moe_stated"  # the attribute of a model
_NO_LIMIT = 10**9  # tokenizers that know of no limit state 10**30


@dataclass(frozen=True)
class EmbeddingSettings:
    """What turns token states into the embedding of a text; prompts are put before every query and every passage.

    ``pooling`` is ``"cls"`` (first token), ``"mean"`` (over all tokens but padding) or ``"last_token"``; ``normalize`` scales
    embeddings to length 1. ``truncate_dim`` leaves only their first dimensions, before they are scaled; None: all.
    """

    pooling: str = "cls"
    normalize: bool = True
    query_prompt: str = ""
    passage_prompt: str = ""
    truncate_dim: int | None = None

    def prompt(self, kind: Literal["query", "passage"]) -> str:
        """The prompt of a kind of text."""
        return self.query_prompt if kind == "query" else self.passage_prompt

    def truncate(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Whole embeddings (n, D), of length 1 with ``normalize``, as they are to be: (n, ``truncate_dim``), or unchanged."""
        if self.truncate_dim is None or self.truncate_dim >= embeddings.shape[-1]:
            return embeddings
        import torch.nn.functional as F

        embeddings = embeddings[..., : self.truncate_dim]
        return F.normalize(embeddings, dim=-1) if self.normalize else embeddings.contiguous()


def read_settings(folder: str | Path, **hub: str | None) -> EmbeddingSettings:
    """The settings that the sentence-transformers files of a folder or hub model state.

    A model without these files (a bare encoder) or one that cannot be reached has the defaults of
    :class:`EmbeddingSettings`; an adapter without them has its base model's. ``hub`` takes ``cache_dir`` and ``token``, as for
    the weights.

    Raises:
        UserError: a file is not JSON, or asks for something that this package cannot compute: another
            pooling, several at once, a projection after it, pooling without the prompt's tokens.
    """
    modules, folder, hub = _modules_of(folder, hub)
    return _settings_of(folder, modules, hub)


def _modules_of(
    folder: str | Path, hub: dict[str, Any]
) -> tuple[list[dict[str, Any]] | None, str | Path, dict[str, Any]]:
    """``modules.json`` and where it lies: in the model's folder, of an adapter without one in its base model's."""
    modules = read_modules(folder, hub)
    if modules is None:
        from clpl_moe.encoder.adapter import described_by  # which loads torch

        place, of_place = described_by(folder, hub)
        if place != str(folder):
            return read_modules(place, of_place), place, of_place
    return modules, folder, hub


def _settings_of(folder: str | Path, modules: list[dict[str, Any]] | None, hub: dict[str, Any]) -> EmbeddingSettings:
    if modules is None:
        return EmbeddingSettings()
    pooling, normalize = EmbeddingSettings.pooling, False
    for module in modules:
        kind = module.get("type", "").rpartition(".")[2]
        if kind == "Pooling":
            place = at(Path(folder, module.get("path", ""), "config.json"))
            pooling = _pooling_of(read_module_config(folder, module, hub), place)
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            place = at(Path(folder, "modules.json"))
            raise UserError(f"{place}: found a module '{kind}', expected only Transformer, Pooling, Normalize")
    described = read_description(folder, hub)
    prompts, truncate_dim = described.get("prompts") or {}, described.get("truncate_dim")
    if truncate_dim is not None and not (type(truncate_dim) is int and truncate_dim > 0):
        place = at(Path(folder, "config_sentence_transformers.json"))
        raise UserError(f"{place}: field 'truncate_dim': found {truncate_dim!r}, expected a number of dimensions")
    return EmbeddingSettings(
        pooling=pooling,
        normalize=normalize,
        query_prompt=prompts.get("query") or "",
        # The names that `SentenceTransformer.encode_document` tries; one of them may be empty.
        passage_prompt=next((prompts[k] for k in ("document", "passage", "corpus") if prompts.get(k)), ""),
        truncate_dim=truncate_dim,
    )


@dataclass(frozen=True)
class Stated:
    """What a model folder states besides weights and tokenizer."""

    settings: EmbeddingSettings = field(default_factory=EmbeddingSettings)
    max_length: int | None = None  # in tokens
    fault: str | None = None  # why the settings cannot be used


def read_stated(folder: str | Path, **hub: str | None) -> Stated:
    """What a folder or hub model states; raises as :func:`read_settings` does."""
    modules, folder, hub = _modules_of(folder, hub)
    return Stated(_settings_of(folder, modules, hub), _max_length_of(folder, modules or [], hub))


def remember_stated(model: nn.Module, folder: str | Path, **hub: str | None) -> None:
    """Keep with a model what its folder states; a fault is no error here: it concerns only those who use the settings."""
    try:
        stated = read_stated(folder, **hub)
    except UserError as error:
        stated = Stated(fault=str(error))
    setattr(model, _STATED, stated)


def stated_by_folder(model: nn.Module) -> Stated:
    """What :func:`remember_stated` kept with a model; otherwise the defaults."""
    return getattr(model, _STATED, Stated())


def _max_length_of(folder: str | Path, modules: list[dict[str, Any]], hub: dict[str, Any]) -> int | None:
    path = next((m.get("path") or "" for m in modules if m.get("type", "").endswith("Transformer")), None)
    if path is None:
        return None
    name = "/".join(filter(None, [path, "sentence_bert_config.json"]))
    length = (read_file(folder, name, dict, hub) or {}).get("max_seq_length")
    return length if type(length) is int and length > 0 else None


def write_settings(folder: str | Path, settings: EmbeddingSettings, max_length: int, hidden_size: int) -> None:
    """Write an encoder's files of sentence-transformers, which loads them; :class:`ValueError` for an unknown pooling."""
    check_pooling(settings.pooling)
    folder = Path(folder)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    if settings.normalize:
        modules.append(("2_Normalize", "Normalize"))
        (folder / "2_Normalize").mkdir(parents=True, exist_ok=True)
    entries = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(modules)
    ]
    write_json(folder / "modules.json", entries)
    modes = {old: name == settings.pooling for name, (old, _) in _POOLING.items()}
    pooling = {"word_embedding_dimension": hidden_size, **modes, "include_prompt": True}
    write_json(folder / "1_Pooling" / "config.json", pooling)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    prompts = {"query": settings.query_prompt, "document": settings.passage_prompt}
    described: dict[str, Any] = {"model_type": "SentenceTransformer", "prompts": prompts, "default_prompt_name": None}
    if settings.truncate_dim is not None:
        described["truncate_dim"] = settings.truncate_dim
    write_json(folder / "config_sentence_transformers.json", {**described, "similarity_fn_name": "cosine"})


def pool(last_hidden_state: torch.Tensor, attention_mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Token states (B, T, D) of any floating dtype to one vector a text, (B, D), in their dtype.

    ``attention_mask`` (B, T) is 1 or True where a token is no padding, which may stand on either side. ``pooling`` is
    ``"cls"``, ``"mean"`` (summed in at least float32) or ``"last_token"``; another raises :class:`ValueError`.
    """
    import torch

    check_pooling(pooling)
    if pooling == "mean":
        wide = torch.promote_types(last_hidden_state.dtype, torch.float32)
        mask = attention_mask.unsqueeze(-1).to(wide)  # (B, T, 1)
        # A text without any token gets zeros, not NaN.
        mean = (last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)  # (B, D)
        return mean.to(last_hidden_state.dtype)
    tokens = attention_mask.to(torch.int32)  # argmax of int64 and bool is not exported to ONNX
    if pooling == "cls":
        index = tokens.argmax(dim=1)  # (B,), the first of the ones
    else:
        index = tokens.shape[1] - 1 - tokens.flip(1).argmax(dim=1)
    rows = torch.arange(tokens.shape[0], device=last_hidden_state.device)
    return last_hidden_state[rows, index]


def check_pooling(pooling: str) -> None:
    if pooling not in _POOLING:
        raise ValueError(f"unknown pooling '{pooling}', expected one of {', '.join(_POOLING)}")


def _pooling_of(config: dict[str, Any], place: str) -> str:
    """Our name for the pooling of a ``1_Pooling/config.json``; without a key the library's default."""
    if "pooling_mode" in config:
        modes = config["pooling_mode"]
        names = {new: name for name, (_, new) in _POOLING.items()}
    else:
        modes = [key for key, on in config.items() if key.startswith(_OLD_PREFIX) and on]
        modes = modes or [_POOLING["mean"][0]]
        names = {old: name for name, (old, _) in _POOLING.items()}
    modes = [modes] if isinstance(modes, str) else modes
    if len(modes) != 1 or modes[0] not in names:
        found = " and ".join(map(str, modes))
        raise UserError(f"{place}: found pooling '{found}', expected one of {', '.join(_POOLING)}")
    if not config.get("include_prompt", True):
        raise UserError(f"{place}: field 'include_prompt': found false, expected true: prompts are pooled too")
    return names[modes[0]]


def longest_input(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stated: int | None = None) -> int:
    """The longest input in tokens: ``stated`` or else the tokenizer's limit, but no more than the encoder's positions."""
    limits = [stated or getattr(tokenizer, "model_max_length", None), max_positions(model)]
    found = [limit for limit in limits if limit is not None and limit < _NO_LIMIT]
    return min(found) if found else getattr(model.config, "max_position_embeddings", 512)


def max_positions(model: nn.Module) -> int | None:
    """The longest sequence that a model has position embeddings for; None where it has no such table."""
    table = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    if table is None:
        return None
    # Where the table has a padding row, as in XLM-R, positions start after it.
    return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)


def check_length(model: nn.Module, max_length: int, option: str = "max_length", name: str = "the encoder") -> None:
    """Raise :class:`OptionError` for ``option`` where an encoder (``name`` in the message) has too few positions."""
    if max_length < 1:
        raise ValueError(f"{option} must be at least 1, found {max_length}")
    limit = max_positions(model)
    if limit is not None and max_length > limit:
        raise OptionError(option, f"found {max_length} tokens, {name} takes {limit} at most")


def check_lengths(
    model: nn.Module, query_max_len: int | None, passage_max_len: int | None, name: str = "the encoder"
) -> None:
    """:func:`check_length` for both kinds of text; one that is None is not known yet."""
    for option, length in (("query_max_len", query_max_len), ("passage_max_len", passage_max_len)):
        if length is not None:
            check_length(model, length, option, name)
