"""The fields of option dataclasses, and the bounds of numbers."""

from __future__ import annotations

import argparse
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from clpl_moe.common.errors import OptionError


class Bounds:
    """The least and the most that a number may be; without a most, it is finite.

    It is the ``action`` of an option, since transformers' parser hands all metadata of a field to argparse.
    """

    def __init__(self, least: float | None = None, most: float | None = None) -> None:
        self.least = -math.inf if least is None else least
        self.most = math.inf if most is None else most

    def __call__(self, *args: Any, **kwargs: Any) -> argparse.Action:
        return _Store(*args, **kwargs)

    def __str__(self) -> str:
        if self.most == math.inf:
            return f"at least {self.least:,}"
        return f"at most {self.most:,}" if self.least == -math.inf else f"{self.least:,} to {self.most:,}"

    def fault(self, value: object) -> str | None:
        """What is wrong with a value; None: nothing, or it is no number."""
        if not isinstance(value, int | float) or isinstance(value, bool):
            return None
        if not value >= self.least:  # nan, too
            return f"found {value}, expected at least {self.least}"
        if value > self.most:
            return f"found {value}, expected at most {self.most:,}"
        # `isinf` does not take a whole number that is larger than any float.
        return f"found {value}, expected a finite number" if abs(value) == math.inf else None


class _Store(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, values)


def option(
    text: str, default: Any = MISSING, *, least: float | None = None, most: float | None = None, **metadata: Any
) -> Any:
    """A field of an option dataclass, with its help text and such as ``choices``; required unless it has a default.

    A number that is given is from ``least`` to ``most``; :func:`check_bounds` says so where it is not, and the help.
    """
    metadata["help"] = text
    if least is not None or most is not None:
        bounds = metadata["action"] = Bounds(least, most)
        metadata["help"] = with_bounds(text, bounds)
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def with_bounds(text: str, bounds: Bounds | None) -> str:
    """The help of an option, with its bounds."""
    if bounds is None:
        return text
    return f"{text[:-1]} ({bounds})." if text.endswith(".") else f"{text} ({bounds})"


def check_outputs(options: Any, *names: str) -> None:
    """Raise :class:`OptionError` for an output without a name: as a path it would be the current folder."""
    for name in names:
        if not getattr(options, name):
            raise OptionError(name, "found nothing, expected the name of an output")


def check_bounds(options: Any, inherited: Mapping[str, Bounds] | None = None) -> None:
    """Raise :class:`OptionError` for the first number out of its bounds, which its field has, or ``inherited`` by name."""
    assert is_dataclass(options)
    for option in fields(options):
        bounds = (inherited or {}).get(option.name, option.metadata.get("action"))
        if isinstance(bounds, Bounds):
            value = getattr(options, option.name, None)
            for one in value if isinstance(value, list | tuple) else [value]:
                if (fault := bounds.fault(one)) is not None:
                    raise OptionError(option.name, fault)


def check_needs(options: Any, needs: Mapping[str, str]) -> None:
    """Raise :class:`OptionError` for the first option that was given, though it has no effect without another one.

    ``needs`` has the other by the option's name: ``guide``, which has to be set, or ``sampling score``, which has to have this value.
    An option counts as given where its value is not its default.
    """
    for name in given(options):
        if name not in needs:
            continue
        other, _, expected = needs[name].partition(" ")
        value = getattr(options, other)
        if expected and value != expected:
            raise OptionError(name, f"goes with {other} {expected}, not with {value}")
        if not expected and value in (None, False, "", []):
            raise OptionError(name, f"goes with {other}, which is not set")


def refuse_revision_of_folder(name: str | Path, revision: str | None, option: str = "revision") -> None:
    """Raise :class:`OptionError` for the ``option`` that gives a model a ``revision``, where the model is a folder of this disk."""
    if revision is not None and Path(name).is_dir():
        raise OptionError(option, f"{name} is a folder here, which has none; name a model of the hub, or leave it out")


def refuse_given(options: Any, other: str, but: Collection[str] = ()) -> None:
    """Raise :class:`OptionError` for the first option that was given, ``but`` for some: all go with another one, which is not."""
    for name in given(options):
        if name not in but:
            raise OptionError(name, f"goes with {other}, which is not set")


def given(options: Any) -> Iterator[str]:
    """The names of options whose value is not their default."""
    for option in fields(options):
        default = option.default if option.default_factory is MISSING else option.default_factory()
        if default is not MISSING and getattr(options, option.name) != default:
            yield option.name
