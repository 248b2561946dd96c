"""The Python form of a command: a function whose keyword arguments are the command's options."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, TypeVar

from clpl_moe.common.cli import load_yaml, parse_values, reads_config
from clpl_moe.common.errors import UserError

Result = TypeVar("Result")


def takes_options(
    *dataclass_types: type | Callable[[], type],
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Let a function of one instance of each dataclass be called with their fields as keyword arguments.

    ``config`` names a YAML file of options, as ``--config`` does, unless a dataclass has a field of that name; keyword
    arguments override it. Calls with the
    instances themselves go through unchanged: a command has parsed them already. A function in place of a dataclass
    gives it at each call, for options that depend on what is registered.

    Raises:
        UserError: at the call, for an unknown argument (with the nearest known name) or an ill-typed value.
    """

    def known_types() -> list[type]:
        return [known if isinstance(known, type) else known() for known in dataclass_types]

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        @functools.wraps(function)
        def call(*instances: Any, **options: Any) -> Result:
            if instances:
                return function(*instances, **options)
            return function(*_parse(known_types(), function.__name__, options))

        known = [f for cls in known_types() for f in fields(cls) if f.init]
        parameters = [_parameter(f) for f in sorted(known, key=_has_default)]
        result = inspect.signature(function).return_annotation
        call.__signature__ = inspect.Signature(parameters, return_annotation=result)  # type: ignore[attr-defined]
        return call

    return decorate


def _parse(dataclass_types: list[type], name: str, options: dict[str, Any]) -> list[Any]:
    config = None if reads_config(dataclass_types) else options.pop("config", None)
    values = {} if config is None else load_yaml(config)
    values |= {key: _plain(value) for key, value in options.items() if value is not None}
    try:
        return parse_values(dataclass_types, f"clpl_moe.{name}", f"{name}()", values)
    except UserError as error:
        raise UserError(str(error).replace("unknown option", "unknown argument")) from None


def _plain(value: Any) -> Any:
    """A value as a YAML file would have it."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _has_default(field: Field) -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING


def _parameter(field: Field) -> inspect.Parameter:
    default = inspect.Parameter.empty if not _has_default(field) else field.default
    if field.default_factory is not MISSING:
        default = field.default_factory()
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=field.type)
