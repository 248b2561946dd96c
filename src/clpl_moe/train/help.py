"""The text of ``--help``: this package's own options by group, then FlagEmbedding's, then transformers'.

Their fields are read from the source files of the installed versions: importing these packages takes several seconds.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from clpl_moe.common.cli import CONFIG_HELP, HelpFormatter, command_name
from clpl_moe.common.options import with_bounds
from clpl_moe.train.options import INHERITED_BOUNDS, OPTIONS, REFUSED, WITHOUT_EFFECT

# Any other value than the default ends in an error; launchers add local_rank themselves.
_HIDDEN = ("config_name", "use_mrl", "local_rank", *(name for name, _ in REFUSED))
_FLAG_EMBEDDING = ("abc/finetune/embedder/AbsArguments.py", "finetune/embedder/encoder_only/m3/arguments.py")
_TRANSFORMERS = ("training_args.py",)


@dataclass
class _Option:
    name: str
    type: str
    default: Any
    help: str
    choices: list[Any] | None


def help_text(prog: str, description: str) -> str:
    """What ``--help`` prints."""
    parser = argparse.ArgumentParser(
        prog=command_name(prog),
        description=description,
        formatter_class=HelpFormatter,
        usage=f"{command_name(prog)} [--config FILE.yaml] [--option value ...]",
        add_help=False,
    )
    general = parser.add_argument_group("general")
    general.add_argument("--help", action="help", help="show this text and exit")
    general.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help=CONFIG_HELP)
    shown = {*WITHOUT_EFFECT, *_HIDDEN}
    groups = [
        *((title, _fields(cls)) for title, cls in OPTIONS.items()),
        ("FlagEmbedding's options", _installed("FlagEmbedding", _FLAG_EMBEDDING)),
        ("transformers' options", _installed("transformers", _TRANSFORMERS)),
    ]
    for title, options in groups:
        group = parser.add_argument_group(title)
        for option in options:
            if option.name not in shown:
                shown.add(option.name)
                _add(group, option)
    return parser.format_help()


def _add(group: argparse._ArgumentGroup, option: _Option) -> None:
    text = with_bounds(" ".join(option.help.split()), INHERITED_BOUNDS.get(option.name))
    text = text.replace("%%", "%").replace("%", "%%")  # some have doubled theirs already
    required = option.default is dataclasses.MISSING
    group.add_argument(
        f"--{option.name}",
        metavar=None if option.choices else option.type,
        choices=option.choices,
        nargs="+" if option.type == "VALUE" else None,
        default=None if required else option.default,
        required=required,
        help=text or " ",
    )


def _fields(cls: type) -> Iterator[_Option]:
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        choices = field.metadata.get("choices")
        if get_origin(hints[field.name]) is Literal:
            choices = list(get_args(hints[field.name]))
        yield _Option(field.name, _shown(str(hints[field.name])), default, field.metadata["help"], choices)


def _installed(package: str, files: tuple[str, ...]) -> Iterator[_Option]:
    """The fields of the dataclasses in a package's source files, which are not run."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return
    for file in files:
        tree = ast.parse(Path(spec.origin).parent.joinpath(file).read_text(encoding="utf-8"))
        for cls in tree.body:
            if isinstance(cls, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in cls.decorator_list):
                yield from _source_fields(cls)


def _source_fields(cls: ast.ClassDef) -> Iterator[_Option]:
    # Of several values of a constant the last is for a new enough torch.
    constants = {
        target.id: _value(node.value, {})
        for node in sorted((n for n in ast.walk(cls) if isinstance(n, ast.Assign)), key=lambda node: node.lineno)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in cls.body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        words = {word.arg: word.value for word in node.value.keywords} if isinstance(node.value, ast.Call) else {}
        if not words or "init" in words:
            continue
        about = {}
        if isinstance(metadata := words.get("metadata"), ast.Dict):
            about = {_value(k, {}): _value(v, constants) for k, v in zip(metadata.keys, metadata.values) if k}
        default = None if "default_factory" in words else dataclasses.MISSING
        if "default" in words:
            default = _value(words["default"], constants)
        yield _Option(
            node.target.id, _shown(ast.unparse(node.annotation)), default, about.get("help") or "", about.get("choices")
        )


def _value(node: ast.expr, constants: dict[str, Any]) -> Any:
    """What an expression of literals stands for; of a name, its constant; of others None."""
    if isinstance(node, ast.Name):
        return constants.get(node.id)
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


def _shown(annotation: str) -> str:
    """The type of an option in a word."""
    for name, shown in (("list", "VALUE"), ("dict", "JSON"), ("bool", "BOOL"), ("int", "INT"), ("float", "FLOAT")):
        if name in annotation.lower():
            return shown
    return "TEXT"
