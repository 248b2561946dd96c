"""Reports: a page that shows how runs went, and what they changed.

``OUTPUT/report.html`` is one file with its pictures inside, without scripts; each picture lies beside it as PNG. It has the
course of each run: loss terms, nDCG, learning rate, gradient norm, similarities, load of the experts. With results of the
base model and of each run it has every query before and after (also as ``per_query.csv``), and the passages retrieved for
the queries that gained and lost most.
"""

from __future__ import annotations

from pathlib import Path

from clpl_moe.common.api import takes_options
from clpl_moe.common.errors import OptionError, UserError, at, no_such
from clpl_moe.common.files import atomic_open, refuse_existing
from clpl_moe.common.output import Output, writing
from clpl_moe.evaluate.metrics import check_metrics
from clpl_moe.evaluate.tasks import model_labels
from clpl_moe.report.before_after import BeforeAfter, compare_results, languages_of, write_queries
from clpl_moe.report.course import RunCourse
from clpl_moe.report.options import ReportArguments
from clpl_moe.report.page import PAGE, render_page
from clpl_moe.train.metrics_file import METRICS_FILE

__all__ = ["ReportArguments", "report"]

_TABLE = "per_query.csv"


@takes_options(ReportArguments)
def report(arguments: ReportArguments) -> Path:
    """Write the report; returns the page.

    Raises:
        UserError: a run or results are missing or broken, matplotlib is not installed, an output is in the way.
    """
    with writing(arguments.output) as output:
        refuse_existing(arguments.output, arguments.overwrite, files=(PAGE, _TABLE, "*.png"))
        _write(arguments, output)
    return Path(arguments.output, PAGE)


def _write(arguments: ReportArguments, output: Output) -> None:
    check_metrics([arguments.metric])
    names = dict(zip(map(Path, arguments.runs), model_labels(arguments.runs)))  # as evaluate names its folders
    if len(names) < len(arguments.runs):
        raise OptionError("runs", "a folder stands there twice")
    places = {name: _course_folder(folder) for folder, name in names.items()}
    courses = [RunCourse.read(place, name) for name, place in places.items() if place is not None]
    comparisons = _comparisons(arguments, names)
    with output.replacement() as temporary:
        page = render_page(arguments, courses, comparisons, temporary)
        with atomic_open(temporary / PAGE) as file:
            file.write(page)
        if comparisons:
            write_queries(temporary / _TABLE, comparisons)


def _course_folder(folder: Path) -> Path | None:
    """Where the course of a run lies: a run of ``ablate`` has it inside, its run of the base model has results only."""
    if not folder.is_dir():
        raise UserError(f"{at(folder)}: {no_such('folder', folder)}")
    if (folder / "model" / METRICS_FILE).is_file():
        return folder / "model"
    return folder if (folder / METRICS_FILE).is_file() or not (folder / "results").is_dir() else None


def _results_folder(folder: Path) -> Path:
    """Where results lie; a run of ``ablate`` has them inside."""
    return folder / "results" if (folder / "results").is_dir() else folder


def _comparisons(arguments: ReportArguments, names: dict[Path, str]) -> list[BeforeAfter]:
    if arguments.before is None:
        return []
    befores = [_results_folder(Path(path)) for path in arguments.before]
    afters = [Path(path) for path in arguments.after or names]
    found = []
    for number, (name, after) in enumerate(zip(names.values(), afters, strict=True)):
        before, results = befores[number % len(befores)], _results_folder(after)
        languages = arguments.languages or [x for x in languages_of(before) if x in languages_of(results)]
        if not languages:
            raise UserError(
                f"{at(results)}: holds no results of a language that {before} has, too; expected what clpl_moe.evaluate"
                f" writes, a folder per language with run.trec ({before} has {', '.join(languages_of(before)) or 'none'})"
            )
        found += [compare_results(name, before, results, language, arguments) for language in languages]
    return found
