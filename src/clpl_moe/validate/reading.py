"""How training reads texts: its tokenizer, prompts and limits, by its config or by options."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from clpl_moe.common.cli import parse
from clpl_moe.common.errors import UserError, at
from clpl_moe.validate.options import ValidateArguments

if TYPE_CHECKING:
    from clpl_moe.data.lengths import Count

KINDS = ("query", "pos", "neg", "neg_q")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Reading:
    """How training reads texts."""

    count: Count | None = None  # of tokens, special ones included; None: characters are counted
    limits: dict[str, int | None] = field(default_factory=lambda: _by_kind(None, None))  # in tokens; None: not known
    prompts: dict[str, str] = field(default_factory=lambda: _by_kind("", ""))
    scores_required: bool = False  # of each line, from a teacher


def _by_kind(query: Value, passage: Value) -> dict[str, Value]:
    return dict(zip(KINDS, (query, passage, passage, query)))


def open_reading(arguments: ValidateArguments) -> tuple[list[str], Reading]:
    """Paths of the data and how training would read them."""
    if arguments.config is None:
        limits = _by_kind(arguments.query_max_len, arguments.passage_max_len)
        required = arguments.knowledge_distillation
        if arguments.tokenizer is None:
            return arguments.train_data, Reading(limits=limits, scores_required=required)
        from clpl_moe.encoder.settings import read_settings

        of_tokenizer = _load_counter(arguments.tokenizer, revision=arguments.revision)
        settings = read_settings(arguments.tokenizer, revision=arguments.revision)
        prompts = _by_kind(settings.query_prompt, settings.passage_prompt)
        return arguments.train_data, Reading(of_tokenizer, limits, prompts, required)
    from clpl_moe.train.arguments import CLPLDataArguments, CLPLModelArguments, CLPLTrainingArguments
    from clpl_moe.train.base_model import resolve_settings

    # Nothing is written: the folder only has to be named.
    argv = ["--config", arguments.config, "--output_dir", "none"]
    for name in ("query_max_len", "passage_max_len", "tokenizer"):
        if (value := getattr(arguments, name)) is not None:
            argv += [f"--{'tokenizer_name' if name == 'tokenizer' else name}", str(value)]
    argv += ["--train_data", *arguments.train_data] if arguments.train_data else []
    model, data, training = parse(
        [CLPLModelArguments, CLPLDataArguments, CLPLTrainingArguments], "clpl_moe.validate", "", argv
    )
    hub = {**model.hub, "trust_remote_code": model.trust_remote_code}
    if model.tokenizer_name is not None:
        hub["revision"] = arguments.revision
    count: Count | None = None
    try:
        count = _load_counter(model.tokenizer_name or model.model_name_or_path, **hub)
    except UserError as error:
        if arguments.tokenizer is not None:
            raise
        print(f"{error}; lengths are in characters (set tokenizer to count tokens)", file=sys.stderr)
    settings = resolve_settings(model, data, training)
    limits = _by_kind(data.query_max_len, data.passage_max_len)
    prompts = _by_kind(settings.query_prompt, settings.passage_prompt)
    required = data.knowledge_distillation or arguments.knowledge_distillation
    return data.train_data, Reading(count, limits, prompts, required)


def _load_counter(name: str, *, trust_remote_code: bool = False, **hub: Any) -> Count:
    """A function that counts the tokens of texts, special ones included, as a model's tokenizer makes them."""
    from transformers import AutoTokenizer

    from clpl_moe.data.lengths import token_counter
    from clpl_moe.encoder.hub import asked
    from clpl_moe.encoder.load import is_nowhere, not_found, try_tokenizer

    if is_nowhere(name, hub, "tokenizer_config.json", "tokenizer.json", "config.json"):
        raise not_found(name, hub)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **asked(hub, name))
        try_tokenizer(tokenizer)
    except Exception as error:  # the tokenizers library raises plain ones
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{at(name)}: the tokenizer cannot be loaded ({reason})") from None
    return token_counter(tokenizer)
