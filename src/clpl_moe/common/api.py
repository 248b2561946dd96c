"""The Python form of a command: a function whose keyword arguments are the command's options."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from clpl_moe.common.cli import nearest, parse, parse_values, read_config, reads_config
from clpl_moe.common.errors import UserError, command

Result = TypeVar("Result")

_CONFIG_HELP = "YAML file of options, or the name of a packaged one such as ko; arguments override it"


def takes_options(
    *dataclass_types: type | Callable[[], type | list[type]], shown: Sequence[type] = ()
) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Let a function of one instance of each dataclass be called with their fields as keyword arguments.

    ``config`` names a file of options as ``--config`` does, unless a dataclass has a field of that name. Arguments
    override the file; one that is None has the option's default. An unknown or missing argument, or an ill-typed value,
    raises :class:`UserError`. Calls with the instances themselves, as commands make them, go through unchanged.

    A function in place of a dataclass returns one or several at each call, for options that depend on what is registered,
    or that take long to import. Signature and docstring get the fields and help of ``shown``, of all unless given.
    """

    def known_types() -> list[type]:
        found: list[type] = []
        for known in dataclass_types:
            given = known if isinstance(known, type) else known()
            found += given if isinstance(given, list) else [given]
        return found

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        @functools.wraps(function)
        def call(*instances: Any, **options: Any) -> Result:
            if instances:
                if not is_dataclass(instances[0]):
                    name = function.__name__
                    raise UserError(f"{name}(): found {instances[0]!r} without a name; write {name}(name=value, ...)")
                return function(*instances, **options)
            return function(*_parse(known_types(), function.__name__, options))

        types = list(shown) or known_types()
        call.option_types = known_types  # type: ignore[attr-defined]
        call.__signature__ = _signature(types, function, bool(shown))  # type: ignore[attr-defined]
        call.__doc__ = _with_help(function.__doc__, types)
        return call

    return decorate


def command_of(
    function: Callable[..., Result],
    description: str,
    positional: str | tuple[str, ...] | None = None,
    **hooks: Callable[..., Any],
) -> Callable[[Callable[[Result], None]], Callable[..., None]]:
    """Make the command of a verb's function (:func:`takes_options`) from a function that prints its result.

    ``positional`` names an option that may also be written as bare words, or several
    that take one word each; ``hooks`` are further arguments of the function.
    """

    def decorate(show: Callable[[Result], None]) -> Callable[..., None]:
        @command
        def main(argv: Sequence[str] | None = None) -> None:
            types = function.option_types()  # type: ignore[attr-defined]
            options = parse(types, f"clpl_moe.{function.__name__}", description, argv, positional)
            show(function(*options, **hooks))

        return main

    return decorate


def _parse(dataclass_types: Sequence[type], name: str, options: dict[str, Any]) -> list[Any]:
    """One instance of each dataclass; messages begin with ``name()`` or with the file of options."""
    place, known = f"{name}()", _fields(dataclass_types)
    config = None
    if not reads_config(dataclass_types) and (named := options.pop("config", None)) is not None:
        path, lines = read_config(named)
        config = path, {key: value for key, value in lines.items() if key not in options}
    for key in options:
        if key not in known:
            raise UserError(f"{place}: unknown argument '{key}'{nearest(key, known, '')}")
    values = {key: _plain(value) for key, value in options.items() if value is not None}
    given = values if config is None else config[1] | values
    if missing := [key for key, field in known.items() if not _has_default(field) and given.get(key) is None]:
        raise UserError(f"{place}: missing argument{'s' * (len(missing) > 1)} {', '.join(missing)}")
    return parse_values(dataclass_types, f"clpl_moe.{name}", place, values, config)


def _plain(value: Any) -> Any:
    """A value as a YAML file would have it."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _fields(dataclass_types: Sequence[type]) -> dict[str, Field]:
    return {field.name: field for cls in dataclass_types for field in fields(cls) if field.init}


def _has_default(field: Field) -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING


def _signature(dataclass_types: Sequence[type], function: Callable[..., Any], open_end: bool) -> inspect.Signature:
    """Every option as a keyword argument, those without a default first."""
    hints: dict[str, Any] = {}
    for described in (*dataclass_types, function):
        try:
            hints |= get_type_hints(described)
        except NameError:  # imported for type checkers only
            continue
    parameters = []
    for field in sorted(_fields(dataclass_types).values(), key=_has_default):
        default = inspect.Parameter.empty if field.default is MISSING else field.default
        default = default if field.default_factory is MISSING else field.default_factory()
        parameters.append(_keyword(field.name, hints.get(field.name, field.type), default))
    if not reads_config(dataclass_types):
        parameters.append(_keyword("config", str | Path | None, None))
    if open_end:
        parameters.append(inspect.Parameter("options", inspect.Parameter.VAR_KEYWORD, annotation=Any))
    result = hints.get("return", inspect.signature(function).return_annotation)
    return inspect.Signature(parameters, return_annotation=result)


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _with_help(doc: str | None, dataclass_types: Sequence[type]) -> str:
    """The docstring, and the help of each option below it, for ``help()`` and notebooks."""
    helps = {name: field.metadata.get("help") for name, field in _fields(dataclass_types).items()}
    lines = [f"    {name}: {text}" for name, text in helps.items() if text is not None]
    if not lines:
        return doc or ""
    if not reads_config(dataclass_types):
        lines.append(f"    config: {_CONFIG_HELP}")
    return "\n".join([inspect.cleandoc(doc or ""), "", "Options:", *lines])
