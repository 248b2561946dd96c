"""How finished runs are known: by all options and contents that decide their results.

Each folder keeps them in ``options.json``. Adding an option keeps finished runs valid; changing a default does not. Names of
rows, places of files and the order of the configuration decide nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clpl_moe.common.cli import parse_values
from clpl_moe.common.errors import UserError
from clpl_moe.common.files import find_json, hash_file
from clpl_moe.common.output import WORK_FOLDER
from clpl_moe.evaluate.options import EvaluateArguments
from clpl_moe.mine.options import MineArguments, SelectionArguments
from clpl_moe.retrieval.options import EncodingArguments
from clpl_moe.train.arguments import CLPLDataArguments, CLPLModelArguments, CLPLTrainingArguments
from clpl_moe.train.resume import resolved_config

OPTIONS_FILE = "options.json"

# Options that decide nothing, or whose files are known by content.
_PLACES = {
    *("output_dir", "output", "run_name", "logging_dir", "cache_path", "cache_dir"),
    *("collection", "language", "overwrite"),
}
# Paths (or hub names) among the options of training.
_SOURCES = (
    *("model_name_or_path", "tokenizer_name", "train_data"),
    *("dev_collection", "ance_collection", "ance_positive_queries"),
)


def digest(value: Any) -> str:
    """SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def content_hash(path: Path) -> str:
    """Hash of a file, or of the names and contents of a folder's files, but for those of a run that was killed there."""
    total = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in [file for file in files if WORK_FOLDER not in file.relative_to(path).parts]:
        total.update(f"{file.relative_to(path)}\0{hash_file(file)}\0".encode())
    return total.hexdigest()


@functools.cache  # a plan compares each of its runs with every folder
def _read_options(path: Path, changed: int) -> dict[str, Any] | None:
    return find_json(path)


def refuse_set(place: str, values: dict[str, Any], *names: str) -> None:
    """Raise :class:`UserError` for an option that the comparison sets."""
    for name in names:
        if name in values:
            instead = " (see option seeds)" if name == "seed" else ""
            raise UserError(f"{place}: '{name}' is set for each run by this command, remove it{instead}")


@dataclass
class Decisive:
    """All options and contents that decide a result, by name, and the defaults of those that have one."""

    values: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)

    def __or__(self, other: Decisive) -> Decisive:
        return Decisive(self.values | other.values, self.defaults | other.defaults)

    @property
    def key(self) -> str:
        return digest(self.values)

    def is_of(self, folder: Path) -> bool:
        """Whether a folder's content was made in the same way. An option that it does not know must have its default now."""
        path = folder / OPTIONS_FILE
        if not path.is_file() or (then := _read_options(path, path.stat().st_mtime_ns)) is None:
            return False
        now = json.loads(json.dumps(self.values, default=str))
        new = {name: value for name, value in self.values.items() if name not in then}
        return then.items() <= now.items() and new.items() <= self.defaults.items()

    def find(self, root: Path, name: str) -> Path:
        """The folder in ``root`` with this content, whatever it is called, or else the one to make."""
        found = [path.parent for path in sorted(root.glob(f"*/{OPTIONS_FILE}")) if self.is_of(path.parent)]
        return found[0] if found else root / f"{name}-{self.key[:10]}"


class CommandOptions:
    """Checks options of the other commands: for each command those to call it with, and the decisive ones."""

    def __init__(self, model: str, revision: str | None = None) -> None:
        self.model, self.revision = model, revision
        self._hash = functools.cache(content_hash)
        self._defaults: dict[str, dict[str, Any]] = {}

    def content(self, source: Any, language: str = "{language}") -> Any:
        """A path, or each in a list, as the hash of what is there; a model of the hub stays as it is."""
        if isinstance(source, list):
            return [self.content(one, language) for one in source]
        path = Path((source or "").replace("{language}", language))
        return self._hash(path) if source and path.exists() else source

    def mine(self, place: str, values: dict[str, Any]) -> tuple[dict[str, Any], Decisive]:
        places = {"collection": "-", "language": "-", "output": "-"}
        refuse_set(place, values, *places)
        required = {"model": self.model, **places}
        given = required | self._pinned("model", values) | values | places
        types = [MineArguments, SelectionArguments, EncodingArguments]
        decisive = self._resolve("mine", types, place, given, required)
        for name in ("mine.model", "mine.reranker", "mine.guide"):
            decisive.values[name] = self.content(decisive.values[name])
        return given, decisive

    def _pinned(self, name: str, values: dict[str, Any]) -> dict[str, Any]:
        """The base model's revision, where ``values`` do not name another model."""
        return {} if self.revision is None or name in values else {"revision": self.revision}

    def evaluate(self, place: str, values: dict[str, Any]) -> tuple[dict[str, Any], Decisive]:
        required = {"model": "-", "collection": "-", "languages": "-", "output": "-"}
        refuse_set(place, values, *required, "overwrite")
        given = values | required
        decisive = self._resolve("evaluate", [EvaluateArguments, EncodingArguments], place, given, required)
        # Metrics are computed from the run file, which these decide.
        of_run = {"split", "top_k", *(f.name for f in dataclasses.fields(EncodingArguments))}
        keep = {name: value for name, value in decisive.values.items() if name.removeprefix("evaluate.") in of_run}
        return given, Decisive(keep, decisive.defaults)

    def train(self, place: str, values: dict[str, Any], language: str) -> tuple[dict[str, Any], Decisive]:
        """The options to call ``train`` with still have placeholders."""
        refuse_set(place, values, "output_dir", "resume_from_checkpoint", "dry_run", "seed")
        for name in ("token", "hub_token"):
            if name in values:
                raise UserError(f"{place}: '{name}' would stand in the results; export HF_TOKEN=… instead")
        types = [CLPLModelArguments, CLPLDataArguments, CLPLTrainingArguments]
        required = {"model_name_or_path": self.model, "train_data": "{train_data}", "output_dir": "-"}
        given = required | self._pinned("model_name_or_path", values) | values
        decisive = self._resolve("train", types, place, given, required)
        # {collection} and {train_data} stay: their content is known by what it is made from.
        for name in [f"train.{source}" for source in _SOURCES]:
            decisive.values[name] = self.content(decisive.values[name], language)
        return given, decisive

    def _resolve(
        self, part: str, types: Sequence[type], place: str, given: dict[str, Any], required: dict[str, Any]
    ) -> Decisive:
        def named(values: dict[str, Any]) -> dict[str, Any]:
            return {f"{part}.{k}": v for k, v in values.items() if k not in _PLACES}

        if part not in self._defaults:
            self._defaults[part] = named(resolved_config(*parse_values(types, f"clpl_moe.{part}", part, required)))
        resolved = resolved_config(*parse_values(types, f"clpl_moe.{part}", place, given))
        return Decisive(named(resolved), self._defaults[part])
