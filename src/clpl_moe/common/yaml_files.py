"""YAML files of options: read into plain values, with file and line of each fault."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from clpl_moe.common.errors import UserError, at, shorten
from clpl_moe.common.files import atomic_open, is_text

_LARGEST = 2**64  # of whole numbers: no option takes more
_DEEPEST, _MOST = 20, 100_000  # levels, and values in all: an alias may stand within itself, or multiply what it names


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads ``1e-5`` as a string, ``0123456`` and ``1:30`` as the numbers 42798 and 90, and takes the last of two equal
    keys; all that surprises in a config."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        keys = [(key.tag, str(key.value)) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                mark = node.value[index][0].start_mark
                raise yaml.composer.ComposerError(None, None, f"'{key[1]}' stands twice", mark)
        return node

    def construct_object(self, node, deep=False):
        try:
            value = super().construct_object(node, deep=deep)
        except (
            ValueError,
            LookupError,
            AttributeError,
            TypeError,
            OverflowError,
        ):  # of dates and numbers that are none
            value = _NONE
        if value is _NONE or (isinstance(value, int) and abs(value) > _LARGEST):
            kind = {"int": "a whole number", "float": "a number", "bool": "true or false", "timestamp": "a date"}
            name = node.tag.rpartition(":")[2]
            found = shorten(str(node.value), 40)
            expected = f"found {found!r}, expected {kind.get(name, name)}; in quotes it is text"
            raise yaml.constructor.ConstructorError(None, None, expected, node.start_mark)
        return as_written(node.value, value) if isinstance(value, float) else value


class _Float(float):
    """A number, and the ``text`` that stands in the file: an option may mean that."""

    text: str


def as_written(text: str, value: float | None = None) -> float:
    """A number with its text, from which it is read unless a ``value`` is given."""
    number = _Float(text if value is None else value)
    number.text = text
    return number


def as_text(value: Any) -> str:
    """A value as it stands in its file: ``12345e6`` may be a commit, and ``1.10`` a version."""
    return value.text if isinstance(value, _Float) else str(value)


def as_json(value: Any) -> str:
    """A mapping as JSON, with its numbers as they stand in their file, where JSON has such."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {as_json(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_json, value)) + "]"
    written = isinstance(value, _Float) and _JSON_NUMBER.fullmatch(value.text)
    return value.text if written else json.dumps(value, default=str)


_JSON_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?")
_NONE = object()
_INT = re.compile(r"^[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$")
_FLOAT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
_DIGITS = list("-+0123456789")
_WHOLE = "tag:yaml.org,2002:int"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in known if tag != _WHOLE]
    for first, known in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_WHOLE, _INT, _DIGITS)


class _Dumper(yaml.SafeDumper):
    """Puts into quotes what :class:`_Loader` would take for a number."""

    def represent_written(self, value: _Float) -> yaml.Node:
        return self.represent_scalar("tag:yaml.org,2002:float", value.text)


_Dumper.add_representer(_Float, _Dumper.represent_written)

for reads_or_writes in (_Loader, _Dumper):
    reads_or_writes.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, [*_DIGITS, "."])


def write_yaml(path: str | Path, values: dict[str, Any]) -> None:
    """Write options as :func:`load_yaml` reads them, whole or not at all."""
    with atomic_open(path) as file:
        yaml.dump(values, file, Dumper=_Dumper, allow_unicode=True, sort_keys=False)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file as a dictionary of plain values; raises :class:`UserError` with file and line where it is not one."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{at(path)}: no such config file")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise UserError(f"{at(path)}: not UTF-8 text ({error.reason})") from None
    except RecursionError:
        raise UserError(f"{at(path)}: not valid YAML: nested too deeply") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else None
        problem = " ".join(str(getattr(error, "problem", error)).split())  # some have two lines
        raise UserError(f"{at(path, line)}: not valid YAML: {problem}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        kind = "text" if isinstance(values, str) else f"a {type(values).__name__}"
        raise UserError(f"{at(path)}: found {kind}, expected 'option: value' lines")
    check_plain(values, at(path))
    return values


def check_plain(values: dict[Any, Any], place: str) -> None:
    """Raise :class:`UserError` where options are not what JSON can hold: names that are none, half characters, values
    within themselves. Dates are as good as text."""
    count = 0
    todo: list[tuple[Any, Any, int]] = [(None, values, 0)]
    while todo:
        option, value, depth = todo.pop()
        count += 1
        where = place if option is None else f"{place}: field '{option}'"
        if depth > _DEEPEST or count > _MOST:
            raise UserError(f"{where}: nested too deeply, or an alias (*) that stands within itself")
        if isinstance(value, str) and not is_text(value):
            raise UserError(f"{where}: found {shorten(repr(value), 40)}, expected text without NUL and half characters")
        if isinstance(value, bytes | set | tuple):
            raise UserError(f"{where}: found a {type(value).__name__}, expected a value, a list or a mapping")
        if isinstance(value, dict):
            for key, inner in value.items():
                if not isinstance(key, str | int) or isinstance(key, bool) or not is_text(str(key)):
                    found = repr(key) if isinstance(key, str) else str(key)
                    raise UserError(f"{where}: found {shorten(found, 40)}, expected a name; put it into quotes")
                todo.append((key if option is None else option, inner, depth + 1))
        elif isinstance(value, list):
            todo += [(option, inner, depth + 1) for inner in value]
