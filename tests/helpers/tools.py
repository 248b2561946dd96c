"""Tools that this package does not need, and that its tests run where they are installed."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import pytest


def need_tool(name: str) -> ModuleType:
    """The module of a tool. Where it is not installed, the test is skipped; it fails where ``scripts/test_tools.sh`` installs all."""
    return importlib.import_module(name) if all_installed() else pytest.importorskip(name)


def all_installed() -> bool:
    return bool(os.environ.get("TOOLS_INSTALLED"))


def need_python(variable: str) -> str:
    """The interpreter, named by an environment variable, of a tool that cannot live beside this package."""
    python = os.environ.get(variable)
    if not python:
        assert not all_installed(), f"{variable} is not set"
        pytest.skip("scripts/test_tools.sh makes the environment")
    return python
