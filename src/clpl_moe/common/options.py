"""The fields of option dataclasses."""

from __future__ import annotations

from dataclasses import MISSING, field
from typing import Any


def option(text: str, default: Any = MISSING) -> Any:
    """A field of an option dataclass, with its help text; required unless it has a default."""
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": text})
    return field(default=default, metadata={"help": text})
