"""One configuration mechanism for every command: dataclasses, a YAML file, command-line overrides.

Values of the YAML file are put in front of the command line's own, so that one parser checks both: the same types, the
same messages, and the command line wins.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
import importlib.machinery
import importlib.util
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from numbers import Number
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

from clpl_moe.common.errors import OptionError, UserError, at, shorten, type_name
from clpl_moe.common.files import is_text
from clpl_moe.common.packaged_files import find_config, with_packaged_samples
from clpl_moe.common.yaml_files import as_json, as_text, check_plain, load_yaml

if TYPE_CHECKING:
    from transformers import HfArgumentParser

CONFIG_HELP = "YAML file of options, or the name of a packaged one such as ko; the command line overrides it"

_called_as: str | None = None


def called_as(program: str | None) -> None:
    """Say how the user calls commands: ``clpl-moe`` before the verb; None: ``python -m`` before the module."""
    global _called_as
    _called_as = program


def command_name(module: str) -> str:
    """How the user calls the command of a module: ``python -m clpl_moe.mine`` or ``clpl-moe mine``."""
    if _called_as is None:
        return f"python -m {module}"
    return f"{_called_as} {module.removeprefix('clpl_moe.')}"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows every option once (the dashed spelling and ``--no_x`` work but are not listed), each with its default."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.default is argparse.SUPPRESS or "%(default)" in text or not action.option_strings:
            return text
        if action.required:
            return f"{text} (required)".strip()
        return f"{text} (default: %(default)s)".strip()

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = [n for n in action.option_strings if "-" not in n.lstrip("-")] or action.option_strings
        value = "" if action.nargs == 0 else " " + self._format_args(action, action.dest.upper())
        return ", ".join(names) + value


def make_parser(
    dataclass_types: Sequence[type], prog: str, description: str, positional: str | tuple[str, ...] | None = None
) -> HfArgumentParser:
    """The argument parser of one command; each dataclass field is an option of the same name.

    A dataclass with a field ``config`` reads that file itself. ``positional`` names a field that may also be written as
    bare words, or several that may be written as one word each.
    """
    several = isinstance(positional, tuple)
    names = " ".join(positional).upper() if isinstance(positional, tuple) else (positional or "").upper()
    words = f" {names}" if several else f" [{names} ...]" if positional else ""
    parser = _parser_class()(
        cast(Any, tuple(dataclass_types)),
        prog=command_name(prog),
        description=description,
        formatter_class=HelpFormatter,
        usage=f"{command_name(prog)}{words} [--config FILE.yaml] [--option value ...]",
        allow_abbrev=False,
    )
    if not reads_config(dataclass_types):
        parser.add_argument("--config", metavar="FILE", help=CONFIG_HELP)
    if positional is not None:
        same = ", ".join(f"--{name.lower()}" for name in names.split())
        parser.add_argument(_WORDS, metavar=names, nargs="*", help=f"the same as {same}")
    for action in parser._actions:
        # `--no_x` beside a true-by-default `--x`: works, but the option is already listed once.
        if action.option_strings and action.option_strings[0].startswith("--no_") and action.nargs == 0:
            action.help = argparse.SUPPRESS
        # A per cent sign in a dependency's help text would be taken for a format; some have doubled theirs already.
        elif action.help:
            action.help = action.help.replace("%%", "%").replace("%", "%%")
    return parser


@functools.cache
def _parser_class() -> type[HfArgumentParser]:
    """transformers' parser. Its module needs nothing else of transformers, whose own import takes most of a second."""
    package = None if "transformers" in sys.modules else importlib.util.find_spec("transformers")
    places = None if package is None else package.submodule_search_locations
    spec = None if places is None else importlib.machinery.PathFinder.find_spec("hf_argparser", places)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        with contextlib.suppress(ImportError):  # of a version whose module does need the rest
            spec.loader.exec_module(module)
            return module.HfArgumentParser
    from transformers import HfArgumentParser

    return HfArgumentParser


_WORDS = "positional words"  # no field has such a name


def reads_config(dataclass_types: Sequence[type]) -> bool:
    """Whether ``config`` is an option of the dataclasses themselves, not a file of their options."""
    return any(f.name == "config" for cls in dataclass_types for f in dataclasses.fields(cls))


def _option_names(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    # A dataclass's own `config` has a type; ours is no option.
    ours = ("help", "config")
    return {a.dest: a for a in parser._actions if a.option_strings and (a.dest not in ours or a.type is not None)}


def nearest(name: str, known: Iterable[str], otherwise: str = "; --help lists the options") -> str:
    """The end of a message on an unknown name: the known one that is most like it."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else otherwise


def _to_argv(path: str | Path, values: dict[str, Any], parser: argparse.ArgumentParser) -> list[str]:
    """Options of a file, or of another place that messages name as ``path``, as a command line has them."""
    known = _option_names(parser)
    check_plain(values, at(path))
    argv: list[str] = []
    for key, value in values.items():
        place = at(path, field=key)
        if key not in known:
            raise UserError(f"{at(path)}: unknown option '{key}'{nearest(str(key), known)}")
        if value is None:
            default = known[key].default
            if default not in (None, [], argparse.SUPPRESS):
                raise UserError(f"{place}: found null, expected a value; without the line it is {default}")
            continue
        items = value if isinstance(value, list) else [value]
        if isinstance(value, list) and known[key].nargs not in ("+", "*"):
            raise UserError(f"{place}: a list was found, one value is expected")
        if not items:
            raise UserError(f"{place}: an empty list was found, at least one value is expected")
        words = [as_json(v) if isinstance(v, dict) else as_text(v) for v in items]
        for item, word in zip(items, words):
            _check_value(place, item, known[key], word)
        # `=` keeps a value that begins with a dash from being taken for an option.
        argv += [f"--{key}={words[0]}"] if len(words) == 1 else [f"--{key}", *words]
    return argv


_KINDS = {"string_to_bool": "true or false", "int": "a whole number", "float": "a number"}


def _check_value(place: str, value: Any, action: argparse.Action, word: str) -> None:
    """Refuse an ill-typed value here, where the file's name is known."""
    if action.type is str and not isinstance(value, str | Number | date | dict):
        raise UserError(f"{place}: found a {type_name(value)}, expected text")
    if value == "" or not callable(action.type):
        return
    try:
        converted = action.type(word)
    except (argparse.ArgumentTypeError, TypeError, ValueError):
        expected = getattr(action.type, "__name__", str(action.type))
        expected = _KINDS.get(expected, expected)
        raise UserError(f"{place}: found {value!r}, expected {expected}") from None
    if action.choices is not None and converted not in action.choices:
        raise UserError(f"{place}: found {value!r}, expected one of {', '.join(map(str, action.choices))}")


def read_config(name: str | Path) -> tuple[Path, dict[str, Any]]:
    """The file that ``--config NAME`` means (:func:`clpl_moe.common.packaged_files.find_config`), and its options."""
    path = find_config(name)
    return path, with_packaged_samples(path, load_yaml(path))


def _without_key(word: str) -> str:
    """A word of a command line for a message; one that may be a key, typed by mistake, is not repeated."""
    key = len(word) >= 20 and re.fullmatch(r"[A-Za-z0-9_-]*[A-Za-z][A-Za-z0-9_-]*", word) and re.search("[0-9]", word)
    return f"{word[:3]}..." if key else word


def parse(
    dataclass_types: Sequence[type],
    prog: str,
    description: str,
    argv: Sequence[str] | None = None,
    positional: str | tuple[str, ...] | None = None,
) -> list[Any]:
    """Read ``--config FILE`` and the command line into one instance of each dataclass (see :func:`make_parser`).

    :class:`UserError` for unknown options (with the nearest known name), ill-typed ones, and missing required ones.
    """
    typed = argv = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser(dataclass_types, prog, description, positional)

    def fail(message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the options")

    if "-h" not in argv and "--help" not in argv:
        parser.error = fail  # type: ignore[method-assign]
        before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        before.add_argument("--config")
        before.error = fail  # type: ignore[method-assign]
        if not reads_config(dataclass_types):
            config, rest = before.parse_known_args(argv)
            if config.config is not None:
                rest = _to_argv(*read_config(config.config), parser) + rest
            argv = rest
        for word in argv:
            name = word.split("=")[0]
            if name.startswith("--") and name not in parser._option_string_actions:
                close = nearest(name[2:].replace("-", "_"), _option_names(parser))
                raise UserError(f"unknown option '{name}'{close}")
    # Words may stand between options, which only the second one reads.
    namespace, unknown = (parser.parse_known_intermixed_args if positional else parser.parse_known_args)(argv)
    if positional is not None and (words := getattr(namespace, _WORDS, None)):
        values = dict(zip(positional, words)) if isinstance(positional, tuple) else {positional: words}
        if isinstance(positional, tuple) and len(words) != len(positional):
            found = f"{len(words)} word{'s' * (len(words) > 1)}"
            raise UserError(f"found {found} without an option, expected {' '.join(positional).upper()}")
        for name, value in values.items():
            option = _option_names(parser)[name].option_strings  # with dashes, too
            if any(word.split("=")[0] in option for word in typed):
                raise UserError(f"--{name}: given as an option and as words without one; give all in one way")
            setattr(namespace, name, value)
    if unknown:
        words = " ".join(map(_without_key, unknown))
        raise UserError(f"cannot read {words!r}: options are written --name value")
    given = {name: _from_home(value) for name, value in vars(namespace).items()}
    for name, value in given.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, str) and not is_text(one):
                raise OptionError(name, f"found {shorten(repr(one), 60)}, expected text in UTF-8, without NUL")
    outputs = []
    for cls in dataclass_types:
        keys = {f.name for f in dataclasses.fields(cls) if f.init}
        try:
            outputs.append(cls(**{k: v for k, v in given.items() if k in keys}))
        except (ValueError, TypeError, FileNotFoundError, ImportError) as error:
            raise UserError(" ".join(str(error).split())) from None  # transformers breaks lines
    return outputs


def look_up(name: str, argv: Sequence[str]) -> str | None:
    """An option on a command line or in its ``--config``, before the options are known. None where it is not given, and where
    :func:`parse` will find a fault."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for known in ("config", name):
        names = dict.fromkeys((f"--{known}", f"--{known.replace('_', '-')}"))
        parser.add_argument(*names, dest=known, nargs="?", const="true")

    def fail(message: str) -> NoReturn:
        raise UserError(message)

    parser.error = fail  # type: ignore[method-assign]
    try:
        found = vars(parser.parse_known_args(argv)[0])
        value = found[name]
        if value is None and found["config"] is not None:
            value = read_config(found["config"])[1].get(name)
    except UserError:
        return None
    return None if value is None or isinstance(value, list | dict) else _from_home(as_text(value))


def _from_home(value: Any) -> Any:
    """An option whose path begins at the user's home: a shell leaves ``--output=~/x`` as it is, and YAML does, too."""
    if isinstance(value, list):
        return [_from_home(one) for one in value]
    at_home = isinstance(value, str) and (value == "~" or value.startswith("~/"))
    return str(Path(value).expanduser()) if at_home else value


def parse_values(
    dataclass_types: Sequence[type],
    prog: str,
    place: str,
    values: dict[str, Any],
    config: tuple[Path, dict[str, Any]] | None = None,
) -> list[Any]:
    """As :func:`parse`, from a dictionary of options as YAML has them, and from a file's, which ``values`` override.

    Messages begin with ``place``, which says where ``values`` stand.
    """
    parser = make_parser(dataclass_types, prog, "")
    argv = [] if config is None else _to_argv(*config, parser)
    argv += _to_argv(place, values, parser)
    try:
        return parse(dataclass_types, prog, "", argv)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def print_counts(counts: Mapping[str, int]) -> None:
    """What a command read, left out and made, a line each."""
    width = max(map(len, counts))
    for name, count in counts.items():
        print(f"{name:<{width}}  {count:>10,}")
    sys.stdout.flush()  # bars on stderr may follow
