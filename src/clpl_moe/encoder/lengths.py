"""How long a text an encoder takes, in tokens."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from clpl_moe.common.errors import OptionError

_NO_LIMIT = 10**9  # tokenizers that know of no limit state 10**30


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


def check_lengths(model: nn.Module, query_max_len: int, passage_max_len: int, name: str = "the encoder") -> None:
    """:func:`check_length` for both kinds of text."""
    check_length(model, query_max_len, "query_max_len", name)
    check_length(model, passage_max_len, "passage_max_len", name)
