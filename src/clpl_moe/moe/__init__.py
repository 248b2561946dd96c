"""Mixture of experts in an encoder's feed-forward layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["Router", "register_router"]

if TYPE_CHECKING:
    from clpl_moe.moe.router import Router, register_router


def __getattr__(name: str) -> Any:
    # Routers need torch, and settings (clpl_moe.moe.config) must not load it.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from clpl_moe.moe import router

    return getattr(router, name)
