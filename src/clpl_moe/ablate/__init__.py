"""Ablations: which part of a recipe brings what, on several languages and seeds.

1. Collections are given, or prepared from files in SQuAD's shape.
2. Negatives are mined once per language and kind.
3. Each row (a named set of options) is trained and evaluated per language and seed, every run in processes of its own.
4. A table (Markdown and JSON) and a picture: mean and spread over the seeds, and the error relative to the first row.

Finished runs are known by the options and contents that decide their results (:mod:`clpl_moe.ablate.identity`) and are not
repeated; an unfinished one resumes from its checkpoint.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clpl_moe.ablate.options import AblateArguments
from clpl_moe.common.api import takes_options
from clpl_moe.common.errors import UserError
from clpl_moe.common.files import refuse_unwritable
from clpl_moe.common.output import writing

__all__ = ["AblateArguments", "Ablation", "ablate"]


@dataclass
class Ablation:
    """The state of a comparison; printed, it is the table.

    ``rows`` are those of :func:`clpl_moe.ablate.results.summarize`. ``to_do`` are jobs that a dry run found unfinished, with
    their folders. ``failed`` are jobs that failed, with the reason; the same call goes on with them.
    """

    rows: list[dict[str, Any]]
    table: str  # the same as Markdown, with a sentence that says what it shows
    output: Path  # the JSON file
    written: bool = False  # whether this call wrote the file; a dry run does not
    to_do: dict[str, Path] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.table


@takes_options(AblateArguments)
def ablate(arguments: AblateArguments) -> Ablation:
    """Run what is missing of a comparison, and write its table. Jobs that fail do not stop the others.

    Raises:
        UserError: a mistake in the configuration, other results in the way.
    """
    if arguments.dry_run:
        return _ablate(arguments)
    if not hasattr(os, "fork"):
        raise UserError(
            "ablate forks its runs from one process, which Windows cannot: use Linux, macOS, or WSL on Windows"
        )
    with writing(arguments.output):
        return _ablate(arguments)


def _ablate(arguments: AblateArguments) -> Ablation:
    from clpl_moe.ablate import results, work
    from clpl_moe.ablate.plan import make_plan
    from clpl_moe.evaluate.metrics import warn_of_cut

    plan = make_plan(arguments)
    for depth in sorted({run.decisive.values["evaluate.top_k"] for run in plan.runs}):  # a run itself warns in its log
        warn_of_cut([arguments.metric], depth)

    def state(**jobs: Any) -> Ablation:
        rows = results.summarize(plan, arguments.metric)
        table = f"{results.question(arguments)}\n\n{results.markdown(results.table_rows(rows))}"
        return Ablation(rows, table, Path(arguments.output), **jobs)

    if not arguments.dry_run:
        results.refuse_other_results(arguments, plan)
        refuse_unwritable(Path(arguments.runs) / "runs")
    chosen = [run for run in plan.runs if not arguments.only or run.row in arguments.only]
    todo = list({run.folder: run for run in chosen if run.result() is None}.values())
    minings = [job for job in plan.minings if not job.finished and any(run.mined is job for run in todo)]
    print(f"{sum(run.result() is not None for run in chosen)} of {len(chosen)} runs are finished", file=sys.stderr)
    if arguments.dry_run:
        return state(to_do={str(job): job.folder for job in minings} | {str(run): run.folder for run in todo})
    for run in chosen:
        if run.result() is not None:
            work.clear(run, arguments.keep_models)
    for job in plan.minings:
        if job.finished:
            work.clear(job, arguments.keep_models)
    with work.Workshop(arguments.parallel) as shop:
        for collection in plan.collections:
            if not collection.finished:
                print(f"collection {collection.language}: {work.prepare(collection)}", file=sys.stderr)
        failed = shop.run_all(minings, lambda job: work.mine(shop, job), "negatives")
        for run in [run for run in todo if run.mined is not None and not run.mined.finished]:
            todo.remove(run)
            failed[str(run)] = "its negatives could not be mined"
        keep, metric = arguments.keep_models, arguments.metric
        failed |= shop.run_all(todo, lambda run: work.train_and_evaluate(shop, run, keep, metric), "runs")
    ablation = state(written=True, failed=failed)
    results.write_results(arguments, plan, ablation.rows, ablation.table)
    return ablation
