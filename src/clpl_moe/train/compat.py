"""Differences between the versions of transformers that this package supports."""

from __future__ import annotations

from typing import Any


def prefer_activation_checkpointing(args: Any) -> None:
    """Move ``gradient_checkpointing*`` of training arguments to the names of transformers 5.20 and later, where it has
    them; it would warn about the old ones otherwise."""
    if not hasattr(args, "activation_checkpointing"):
        return
    for old, new in (
        ("gradient_checkpointing", "activation_checkpointing"),
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
    ):
        if getattr(args, old) is not None and getattr(args, new) is None:
            setattr(args, new, getattr(args, old))
            setattr(args, old, None)
