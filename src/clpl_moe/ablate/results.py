"""The results of an ablation on disk: JSON, Markdown and picture."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from clpl_moe.ablate.identity import digest
from clpl_moe.ablate.options import AblateArguments
from clpl_moe.ablate.plan import Plan
from clpl_moe.ablate.table import table_rows
from clpl_moe.common.errors import UserError
from clpl_moe.common.files import atomic_open, refuse_existing, refuse_unwritable, write_json
from clpl_moe.common.machine import machine, versions, without_folders


def identity(arguments: AblateArguments) -> str:
    """A hash of all that the configuration compares."""
    values = {"seeds": arguments.seeds, "metric": arguments.metric, "model": arguments.model}
    return digest(values | arguments.mappings)


def question(arguments: AblateArguments) -> str:
    """What the table shows, in words."""
    return (
        f"{arguments.metric} on the dev queries: mean and standard deviation over seeds. Error: 1 − {arguments.metric},"
        f" compared with the first row; of the average, and of {', '.join(arguments.mappings['languages'])}."
    )


def refuse_other_results(arguments: AblateArguments) -> None:
    """Raise :class:`UserError` where results of another configuration would be replaced unasked."""
    path = Path(arguments.output)
    refuse_unwritable(path)
    try:
        if json.loads(path.read_text(encoding="utf-8"))["ablation"] == identity(arguments):
            return
    except (OSError, ValueError, KeyError, TypeError):
        pass
    for place in (path, path.with_suffix(".md"), path.with_suffix(".png")):
        refuse_existing(place, arguments.overwrite)


def write_results(arguments: AblateArguments, plan: Plan, summary: list[dict[str, Any]], table: str) -> None:
    """Write JSON, Markdown and, where matplotlib is installed, the picture."""
    path = Path(arguments.output)
    results = [(run, run.result()) for run in plan.runs]
    finished = [(run, result) for run, result in results if result is not None]
    precisions = {result["dtype"] for _, result in finished}
    precisions |= {result["training"]["precision"] for _, result in finished if result["training"]}
    content = {
        "ablation": identity(arguments),
        "question": question(arguments),
        "command": shlex.join(["python", "-m", "clpl_moe.ablate", *without_folders(sys.argv[1:])]),
        "machine": machine(),
        "versions": versions(),
        "settings": {
            "model": Path(arguments.model).name,
            "precision": " and ".join(sorted(precisions)),
            "metric": arguments.metric,
            **{name: arguments.mappings[name] for name in ("mine", "train", "evaluate", "rows")},
        },
        "rows": table_rows(summary),
        "measurements": {
            "summary": summary,
            "runs": [
                {
                    "row": run.row,
                    **{k: result[k] for k in ("language", "seed", "key", "metrics", "dtype", "training")},
                    "machine": result["machine"],
                }
                for run, result in finished
            ],
            "missing": [str(run) for run, result in results if result is None],
        },
    }
    write_json(path, content)
    with atomic_open(path.with_suffix(".md")) as file:
        file.write(f"{table}\n")
    from clpl_moe.ablate.picture import plot_comparison

    try:
        plot_comparison(summary, arguments.metric, path.with_suffix(".png"))
    except UserError as error:
        print(f"no picture: {error}", file=sys.stderr)
