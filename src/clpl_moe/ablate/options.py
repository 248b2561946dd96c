"""The options of ``clpl_moe.ablate``."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clpl_moe.common.errors import OptionError, UserError
from clpl_moe.common.files import parse_json
from clpl_moe.common.options import check_bounds, check_outputs, option
from clpl_moe.common.yaml_files import as_written

_MAPPINGS = ("languages", "rows", "prepare", "mine", "train", "evaluate")


@dataclass
class AblateArguments:
    """What to compare. Mappings stand in the ``--config`` file, or are dictionaries in Python (``mappings``)."""

    model: str = option("base model: folder or hub name")
    languages: str = option(
        "mapping: language -> `collection` (folder that holds a folder per language) or `squad` (files to"
        " prepare one from), and optionally `mine`, `train`, `evaluate`: options for this language"
    )
    rows: str = option(
        "mapping: row -> `label`, `mine` and `train` (options that differ from the shared ones; `train: false` is"
        " the base model), `seeds`; the first row is what the others are compared with"
    )
    revision: str | None = option("commit, branch or tag of a base model on the hub; not given: the newest", None)
    prepare: str = option("mapping: options of clpl_moe.prepare, for `squad`", "{}")
    mine: str = option("mapping: options of clpl_moe.mine that all rows share", "{}")
    train: str = option(
        "mapping: options of clpl_moe.train that all rows share; {collection}, {language} and {train_data} in a"
        " value stand for those of the run",
        "{}",
    )
    evaluate: str = option("mapping: options of clpl_moe.evaluate", "{}")
    seeds: list[int] = option("seeds of the training", [42, 43, 44], least=0, most=4_294_967_295)
    metric: str = option("metric of the table", "nDCG@5")
    runs: str = option("folder of all runs; finished ones are not repeated", "runs/ablation")
    output: str = option(
        "JSON file of the results; table (.md) and picture (.png) lie beside it", "runs/ablation/ablation.json"
    )
    only: list[str] | None = option("rows to run now; the table has the others as far as they are finished", None)
    parallel: int = option(
        "runs at a time; they share the processor's cores and take one GPU each", 1, least=1, most=1_000
    )
    keep_models: bool = option("keep every run's weights, not only its results", False)
    dry_run: bool = option("say which runs are finished and which are not, and stop", False)
    overwrite: bool = option("replace results of runs that this comparison does not have", False)
    mappings: dict[str, dict[str, Any]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.mappings = {name: mapping(name, getattr(self, name)) for name in _MAPPINGS}
        for name in ("languages", "rows"):
            if not self.mappings[name]:
                raise OptionError(name, "found nothing, expected at least one")
        check_bounds(self)
        check_outputs(self, "runs")
        if Path(self.output).suffix != ".json":
            raise OptionError("output", f"found {self.output}, expected a name ending in .json")
        for name in self.only or ():
            if name not in self.mappings["rows"]:
                raise OptionError("only", f"found '{name}', expected some of {', '.join(self.mappings['rows'])}")


def mapping(place: str, value: Any, known: set[str] | None = None) -> dict[str, Any]:
    """A part of the configuration, given as a dictionary or as JSON; ``known`` are the entries that it may have."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = parse_json(value.encode(), parse_float=as_written)  # text that looks like a number stays
    if not isinstance(value, dict):
        raise UserError(f"{place}: found {value!r}, expected a mapping of names to values")
    for name in value:
        if known is not None and name not in known:
            raise UserError(f"{place}: unknown entry '{name}', expected some of {', '.join(sorted(known))}")
    return value
