"""The files that all languages and models of an output share: ``per_query.csv`` and ``significance.json``.

A call writes what it found into them. What they hold of other languages and models stays, as long as the results that it came
from do: they are there, and in a language that this call evaluates they are of the same collection.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from clpl_moe.common.errors import UserError, at
from clpl_moe.common.files import atomic_open, read_json, write_json
from clpl_moe.common.markup import csv_writer, from_csv, to_csv
from clpl_moe.evaluate.metrics import M3_SCORES
from clpl_moe.evaluate.results import Result
from clpl_moe.evaluate.significance import TEST
from clpl_moe.evaluate.tasks import METRICS_FILE, model_labels, read_result
from clpl_moe.retrieval.collection import Collection

TABLE, SIGNIFICANCE = "per_query.csv", "significance.json"

_COLUMNS = ["language", "query_id", "query"]  # of the table, before those of the metrics
_OF_A_COMPARISON = {"language", "score", "metric", "first", "second"}
_LONGEST_CELL = 2**30  # a query may be longer than Python's csv takes by itself


def refuse_others_files(output: Path) -> None:
    """Raise :class:`UserError` where a file of the same name, but of something else, is in the way."""
    for _ in _read_table(output / TABLE):
        break
    _read_comparisons(output / SIGNIFICANCE)


def write_shared_files(
    output: Path,
    collections: Mapping[str, Collection],
    results: Sequence[Result],
    metrics: Sequence[str],
    comparisons: Sequence[dict[str, Any]],
    computed: set[tuple[str, str]],
) -> None:
    """Write both files.

    Args:
        output: the folder.
        collections: by language, those that this call evaluated.
        results: what it found.
        metrics: the metrics of these results.
        comparisons: of the models of this call.
        computed: label of the model and language of results that were not there before.
    """

    @cache
    def stands(label: str, language: str) -> bool:
        wanted = collections[language].fingerprint() if language in collections else None
        # Of several models each has a folder of its own; a single one's label is that of the model it names.
        for folder, single in ((output / label / language, False), (output / language, True)):
            try:
                found = read_result(folder / METRICS_FILE)
            except UserError:
                continue
            if wanted in (None, found["collection_hash"]) and (not single or _label(found) == label):
                return True
        return False

    _write_table(output / TABLE, collections, results, metrics, stands)
    made = [_pair(c) for c in comparisons]
    kept = [
        old
        for old in _read_comparisons(output / SIGNIFICANCE)
        if _pair(old) not in made
        and all(
            stands(old[n], old["language"]) and (old[n], old["language"]) not in computed for n in ("first", "second")
        )
    ]
    if comparisons or kept:
        write_json(output / SIGNIFICANCE, {"test": TEST, "comparisons": [*comparisons, *kept]})
    else:
        (output / SIGNIFICANCE).unlink(missing_ok=True)


def _label(result: dict[str, Any]) -> str | None:
    model = result.get("model")
    return model_labels([model])[0] if isinstance(model, str) else None


def _pair(comparison: dict[str, Any]) -> tuple[Any, ...]:
    names = {comparison["first"], comparison["second"]}
    return comparison["language"], comparison["score"], comparison["metric"], names


def _write_table(
    path: Path,
    collections: Mapping[str, Collection],
    results: Sequence[Result],
    metrics: Sequence[str],
    stands: Callable[[str, str], bool],
) -> None:
    """A row for each judged query, a column for each metric of each model and kind of score."""
    systems = list(dict.fromkeys(result.system for result in results))
    columns = dict.fromkeys(f"{name} {system}" for name in metrics for system in systems)
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for language, collection in collections.items():
        own = [result for result in results if result.language == language]
        for query_id, text in zip(collection.query_ids, collection.queries):
            if query_id in collection.qrels:
                values = {f"{name} {r.system}": r.per_query[query_id][name] for r in own for name in metrics}
                rows[language, query_id] = {"query": text, **values}
    found = {(result.language, result.system) for result in results}
    for old in _read_table(path):
        language, query_id, query = (from_csv(old.pop(name)) for name in _COLUMNS)
        if language in collections and (language, query_id) not in rows:
            continue  # not judged any more
        kept = {}
        for column, value in old.items():
            system = column.partition(" ")[2]
            if value and (language, system) not in found and stands(_label_of(system), language):
                kept[column] = value
        if kept:
            rows.setdefault((language, query_id), {"query": query}).update(kept)
            columns |= dict.fromkeys(kept)
    with atomic_open(path) as file:
        writer = csv_writer(file)
        writer.writerow([*_COLUMNS, *columns])
        for (language, query_id), row in rows.items():
            texts = map(to_csv, (language, query_id, row["query"]))
            writer.writerow([*texts, *(row.get(column, "") for column in columns)])


def _label_of(system: str) -> str:
    """The model's label, without the kind of score that the name of a system may end in."""
    return next((system.removesuffix(f" {score}") for score in M3_SCORES if system.endswith(f" {score}")), system)


def _read_table(path: Path) -> Iterator[dict[str, str]]:
    """The rows of an earlier table, by column; none where there is no table."""
    if not path.exists():
        return
    other = UserError(f"{at(path)}: found another file, expected none or an earlier table; name another output")
    csv.field_size_limit(_LONGEST_CELL)
    if not path.is_file():
        raise other
    try:
        with path.open(encoding="utf-8", newline="") as file:
            if not file.readline().startswith(f"{','.join(_COLUMNS)},"):
                raise other
            file.seek(0)
            for row in csv.DictReader(file, strict=True):
                if None in row or None in row.values():
                    raise other
                yield dict(row)
    except (OSError, UnicodeDecodeError, csv.Error):
        raise other from None


def _read_comparisons(path: Path) -> list[dict[str, Any]]:
    """The comparisons of an earlier file; none where there is no file."""
    if not path.exists():
        return []
    try:
        found = read_json(path, dict)["comparisons"]
        if all(comparison.keys() >= _OF_A_COMPARISON for comparison in found):
            return list(found)
    except (OSError, UserError, LookupError, TypeError, AttributeError):
        pass
    raise UserError(f"{at(path)}: found another file, expected none or earlier comparisons; name another output")
