"""The fields of option dataclasses."""

from __future__ import annotations

from dataclasses import MISSING, field
from typing import Any


def option(text: str, default: Any = MISSING, **metadata: Any) -> Any:
    """A field of an option dataclass, with its help text and such as ``choices``; required unless it has a default."""
    metadata["help"] = text
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)
