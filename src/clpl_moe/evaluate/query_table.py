"""``per_query.csv``: all models' metrics of each query, side by side."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from clpl_moe.common.errors import UserError, at
from clpl_moe.common.files import atomic_open
from clpl_moe.evaluate.results import Result
from clpl_moe.retrieval.collection import Collection

_COLUMNS = ["language", "query_id", "query"]


def refuse_other_table(path: Path) -> None:
    """Raise :class:`UserError` where the file is not a table of ours. An earlier table is made anew from the run files."""
    if path.exists():
        heading = f"{','.join(_COLUMNS)},".encode()
        with path.open("rb") as file:
            if file.read(len(heading)) != heading:
                raise UserError(
                    f"{at(path)}: found another file, expected none or an earlier table; name another output"
                )


def write_query_table(
    path: Path, collections: Mapping[str, Collection], results: Sequence[Result], metrics: Sequence[str]
) -> None:
    """A row for each judged query, a column for each metric of each model and kind of score."""
    values = {(result.language, result.system): result.per_query for result in results}
    systems = list(dict.fromkeys(result.system for result in results))
    with atomic_open(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*_COLUMNS, *(f"{name} {system}" for name in metrics for system in systems)])
        for language, collection in collections.items():
            for query_id, text in zip(collection.query_ids, collection.queries):
                if query_id in collection.qrels:
                    row = (values[language, system][query_id][name] for name in metrics for system in systems)
                    writer.writerow([language, query_id, text, *row])
