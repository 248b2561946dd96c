"""The options of ``clpl_moe.ablate``."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clpl_moe.common.errors import OptionError, UserError, require_at_least

_MAPPINGS = ("languages", "rows", "prepare", "mine", "train", "evaluate")


@dataclass
class AblateArguments:
    """What to compare. Mappings stand in the ``--config`` file, or are dictionaries in Python.

    Attributes:
        mappings: those options that are mappings, as dictionaries.
    """

    model: str = field(metadata={"help": "base model: folder or hub name"})
    languages: str = field(
        metadata={
            "help": "mapping: language -> `collection` (folder that holds a folder per language) or `squad` (files to"
            " prepare one from), and optionally `mine`, `train`, `evaluate`: options for this language"
        }
    )
    rows: str = field(
        metadata={
            "help": "mapping: row -> `label`, `mine` and `train` (options that differ from the shared ones; `train: false` is"
            " the base model), `seeds`; the first row is what the others are compared with"
        }
    )
    prepare: str = field(default="{}", metadata={"help": "mapping: options of clpl_moe.prepare, for `squad`"})
    mine: str = field(default="{}", metadata={"help": "mapping: options of clpl_moe.mine that all rows share"})
    train: str = field(
        default="{}",
        metadata={
            "help": "mapping: options of clpl_moe.train that all rows share; {collection}, {language} and {train_data} in a"
            " value stand for those of the run"
        },
    )
    evaluate: str = field(default="{}", metadata={"help": "mapping: options of clpl_moe.evaluate"})
    seeds: list[int] = field(default_factory=lambda: [42, 43, 44], metadata={"help": "seeds of the training"})
    metric: str = field(default="nDCG@5", metadata={"help": "metric of the table"})
    runs: str = field(default="runs/ablation", metadata={"help": "folder of all runs; finished ones are not repeated"})
    output: str = field(
        default="runs/ablation/ablation.json",
        metadata={"help": "JSON file of the results; table (.md) and picture (.png) lie beside it"},
    )
    only: list[str] | None = field(
        default=None, metadata={"help": "rows to run now; the table has the others as far as they are finished"}
    )
    parallel: int = field(
        default=1, metadata={"help": "runs at a time; they share the processor's cores and take one GPU each"}
    )
    keep_models: bool = field(default=False, metadata={"help": "keep every run's weights, not only its results"})
    dry_run: bool = field(default=False, metadata={"help": "say which runs are finished and which are not, and stop"})
    overwrite: bool = field(default=False, metadata={"help": "replace the results of another configuration"})
    mappings: dict[str, dict[str, Any]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.mappings = {name: mapping(name, getattr(self, name)) for name in _MAPPINGS}
        for name in ("languages", "rows"):
            if not self.mappings[name]:
                raise OptionError(name, "found nothing, expected at least one")
        require_at_least(self, parallel=1)
        if Path(self.output).suffix != ".json":
            raise OptionError("output", f"found {self.output}, expected a name ending in .json")
        for name in self.only or ():
            if name not in self.mappings["rows"]:
                raise OptionError("only", f"found '{name}', expected some of {', '.join(self.mappings['rows'])}")


def mapping(place: str, value: Any, known: set[str] | None = None) -> dict[str, Any]:
    """A part of the configuration, given as a dictionary or as JSON; ``known`` are the entries that it may have."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if not isinstance(value, dict):
        raise UserError(f"{place}: found {value!r}, expected a mapping of names to values")
    for name in value:
        if known is not None and name not in known:
            raise UserError(f"{place}: unknown entry '{name}', expected some of {', '.join(sorted(known))}")
    return value
