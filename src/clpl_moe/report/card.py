"""Results of ``clpl_moe.evaluate`` go into the model card of a run.

The card gets a table for its reader and ``model-index`` for the hub, in place of the results that it has.
"""

from __future__ import annotations

from pathlib import Path

from clpl_moe.common.api import takes_options
from clpl_moe.common.errors import UserError, at
from clpl_moe.common.files import resolved
from clpl_moe.common.output import writing
from clpl_moe.evaluate.tasks import METRICS_FILE, read_result
from clpl_moe.report.options import CardArguments
from clpl_moe.train.card import Evaluated, add_results


@takes_options(CardArguments)
def card(arguments: CardArguments) -> list[Evaluated]:
    """Put results into ``README.md`` of a run's folder; returns them, one for each language.

    Raises:
        UserError: there is no card, there are no results, or the base model's are of another collection.
    """
    found, before, after = [], arguments.before, arguments.after
    for path in sorted(Path(after).glob(f"*/{METRICS_FILE}")):
        language = path.parent.name
        own, base = read_result(path), None
        if before is not None and (other := Path(before, language, METRICS_FILE)).exists():
            base = read_result(other)
            if base["collection_hash"] != own["collection_hash"]:
                raise UserError(f"{at(other)}: results of another collection than those in {path}")
        name = resolved(own["collection"]).name
        found.append(Evaluated(name, language, own["split"], own["metrics"], base and base["metrics"]))
    if not found:
        raise UserError(f"{at(after)}: holds no results of clpl_moe.evaluate, expected <language>/metrics.json")
    if before is not None and all(result.before is None for result in found):
        raise UserError(f"{at(before)}: holds no results of a language that {after} has")
    with writing(arguments.run, inside=True):
        add_results(arguments.run, found)
    return found
