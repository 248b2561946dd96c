"""The contrastive learning penalty loss, for any trainer."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from clpl_moe.loss.options import CLPLOptions

if TYPE_CHECKING:
    from clpl_moe.loss.clpl import CLPLLoss, CLPLOutput
    from clpl_moe.loss.sentence_transformers import CachedSentenceTransformerCLPLLoss, SentenceTransformerCLPLLoss

__all__ = [
    "CLPLLoss",
    "CLPLOptions",
    "CLPLOutput",
    "CachedSentenceTransformerCLPLLoss",
    "SentenceTransformerCLPLLoss",
]

# These need torch, which the options do without.
_MODULES = {
    "CLPLLoss": "clpl",
    "CLPLOutput": "clpl",
    "CachedSentenceTransformerCLPLLoss": "sentence_transformers",
    "SentenceTransformerCLPLLoss": "sentence_transformers",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
