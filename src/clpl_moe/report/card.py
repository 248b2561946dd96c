"""``python -m clpl_moe.card``: put results of ``clpl_moe.evaluate`` into the model card of a run.

The card gets a table for its reader and ``model-index`` for the hub, in place of the results that it has.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from clpl_moe.common.errors import UserError, at

if TYPE_CHECKING:
    from clpl_moe.train.card import Evaluated


@dataclass
class CardArguments:
    """Whose card, and which results."""

    run: str = field(metadata={"help": "run folder of clpl_moe.train"})
    after: str = field(metadata={"help": "folder of its results, which holds a folder per language"})
    before: str | None = field(default=None, metadata={"help": "the same of the base model"})


def read_results(after: str | Path, before: str | Path | None = None) -> list[Evaluated]:
    """Results of a run on each language, beside those of its base model where it has them.

    Raises:
        UserError: there are none, or those of the base model are of another collection.
    """
    from clpl_moe.report.results import read_result
    from clpl_moe.train.card import Evaluated

    found = []
    for path in sorted(Path(after).glob("*/metrics.json")):
        own, base = read_result(path), None
        if before is not None and (other := Path(before, path.parent.name, path.name)).exists():
            base = read_result(other)
            if base["collection_hash"] != own["collection_hash"]:
                raise UserError(f"{at(other)}: results of another collection than those in {path}")
        found.append(
            Evaluated(
                Path(own["collection"]).resolve().name,
                path.parent.name,
                own["split"],
                own["metrics"],
                base and base["metrics"],
            )
        )
    if not found:
        raise UserError(f"{at(after)}: holds no results of clpl_moe.evaluate, expected <language>/metrics.json")
    if before is not None and all(result.before is None for result in found):
        raise UserError(f"{at(before)}: holds no results of a language that {after} has")
    return found
