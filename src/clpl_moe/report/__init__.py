"""``python -m clpl_moe.report RUN... --output DIR``: a page that shows how runs went, and what they changed.

``DIR/report.html`` is one file with its pictures inside, without scripts; each picture lies beside it as PNG.

* Of each run folder: loss terms, nDCG in training, learning rate, gradient norm, similarities, load of the experts.
* With ``--before`` and ``--after``, results of ``clpl_moe.evaluate`` of the base model and of each run: every query before and
  after (also as ``per_query.csv``), and those that gained and lost most, with their texts and what was retrieved.
"""

from __future__ import annotations

import csv
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from clpl_moe import __version__
from clpl_moe.common.errors import UserError, at
from clpl_moe.common.files import atomic_dir, atomic_open, refuse_existing
from clpl_moe.report.results import BeforeAfter, RunCourse, compare_results, languages_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "report.html"

# Name in metrics.jsonl, title, unit, caption.
_CURVES = (
    ("loss", "Loss", "loss", "What is minimised: the terms below, weighted."),
    ("contrastive", "Contrastive term", "cross entropy, nats", "How hard it is to tell the positive from the negatives."),
    ("penalty", "Penalty", "penalty", "How far negatives are from the queries that they answer."),
    ("symmetric", "Symmetric term", "cross entropy, nats", "How hard it is for a positive to find its query."),
    ("balance", "Balance loss of the routers", "loss", "1 for an even load."),
    ("z", "Z-loss of the routers", "loss", "Squared size of the router's logits."),
    ("positive_similarity", "Query and positive", "cosine", "Mean similarity of queries and their positives."),
    ("negative_similarity", "Query and hard negative", "cosine", "Mean similarity of queries and their hard negatives."),
    ("negative_query_similarity", "Negative and its own query", "cosine", "Mean similarity of negatives and queries they answer."),
    ("eval_ndcg@5", "nDCG@5 on the dev queries", "nDCG@5", "Evaluation in training."),
    ("eval_ndcg@10", "nDCG@10 on the dev queries", "nDCG@10", "Evaluation in training."),
    ("learning_rate", "Learning rate", "learning rate", "Of the optimizer, by its schedule."),
    ("grad_norm", "Gradient norm", "L2 norm", "Of all trained parameters, before clipping."),
)  # fmt: skip

_FACTS = (
    ("base model", ("model_name_or_path",), "{}"),
    ("trained", ("trainable",), "{}"),
    ("frozen layers", ("frozen_layers",), "{}"),
    ("experts", ("num_experts", "top_k", "moe_target", "router"), "{} per layer, top {} ({}, {})"),
    ("temperature, λ", ("temperature", "penalty_weight"), "{}, {}"),
    ("penalty", ("penalty",), "{}"),
    ("batch", ("per_device_train_batch_size", "gradient_accumulation_steps"), "{} queries × {} accumulated"),
    ("passages a query", ("train_group_size",), "{}"),
    ("learning rate", ("learning_rate",), "{}"),
    ("seed", ("seed",), "{}"),
)


@dataclass
class ReportArguments:
    """What to report on, and where to."""

    output: str = field(metadata={"help": "folder for the page and its pictures"})
    runs: list[str] = field(
        default_factory=list, metadata={"help": "run folders of clpl_moe.train or of clpl_moe.ablate"}
    )
    before: list[str] | None = field(
        default=None,
        metadata={
            "help": "folder of the base model's results (of clpl_moe.evaluate: holds a folder per language), or its run folder"
            " of clpl_moe.ablate; one for all runs, or one for each"
        },
    )
    after: list[str] | None = field(
        default=None,
        metadata={"help": "folders of the runs' results, one for each; runs of clpl_moe.ablate bring their own"},
    )
    collection: str | None = field(
        default=None, metadata={"help": "folder of the collections; not given: the one that the results name"}
    )
    languages: list[str] | None = field(
        default=None, metadata={"help": "languages to compare; not given: all that both results have"}
    )
    metric: str = field(default="nDCG@5", metadata={"help": "what queries are compared by"})
    examples: int = field(default=5, metadata={"help": "queries shown of those that gained and lost most"})
    passages: int = field(default=3, metadata={"help": "passages shown of each, before and after"})
    title: str | None = field(default=None, metadata={"help": "title of the page"})
    overwrite: bool = field(default=False, metadata={"help": "replace the report that is there"})

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("no run to report on: name at least one run folder")
        for name in ("examples", "passages"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}: found {getattr(self, name)}, expected at least 1")
        if self.after is not None and len(self.after) != len(self.runs):
            raise UserError(f"--after: found {len(self.after)}, expected one for each of the {len(self.runs)} runs")
        if self.before is not None and len(self.before) not in (1, len(self.runs)):
            raise UserError(f"--before: found {len(self.before)}, expected one, or one for each of the runs")
        if self.after is not None and self.before is None:
            raise UserError("--after: its results are compared with those of the base model, expected --before, too")


@dataclass
class Chart:
    """A picture: the file's name without its ending, what it shows, and the element for the page."""

    name: str
    caption: str
    svg: str


def report(arguments: ReportArguments) -> Path:
    """Write the report; returns the page.

    Raises:
        UserError: a run or results are missing or broken, matplotlib is not installed, an output is in the way.
    """
    from clpl_moe.evaluate.labels import model_labels
    from clpl_moe.evaluate.metrics import check_metrics

    output = Path(arguments.output)
    refuse_existing(output, arguments.overwrite, marker=PAGE)
    check_metrics([arguments.metric])
    folders = [Path(run) for run in arguments.runs]
    if len(set(folders)) < len(folders):
        raise UserError("runs: a folder stands there twice")
    names = dict(zip(folders, model_labels(arguments.runs)))  # as evaluate names its folders
    courses = [RunCourse.read(_course_folder(folder), names[folder]) for folder in folders if _has_course(folder)]
    comparisons = _comparisons(arguments, folders, names)
    with atomic_dir(output) as temporary:
        page = _page(arguments, courses, comparisons, temporary)
        with atomic_open(temporary / PAGE) as file:
            file.write(page)
        if comparisons:
            _write_queries(temporary / "per_query.csv", comparisons)
    return output / PAGE


def _course_folder(folder: Path) -> Path:
    """Where the course of a run lies; a run of ``ablate`` has it inside."""
    return folder / "model" if (folder / "model" / "metrics.jsonl").is_file() else folder


def _results_folder(folder: Path) -> Path:
    """Where results lie; a run of ``ablate`` has them inside."""
    return folder / "results" if (folder / "results").is_dir() else folder


def _has_course(folder: Path) -> bool:
    if not folder.is_dir():
        raise UserError(f"{at(folder)}: no such folder")
    # ablate's run of the base model has results only.
    return (_course_folder(folder) / "metrics.jsonl").is_file() or not (folder / "results").is_dir()


def _comparisons(arguments: ReportArguments, folders: list[Path], names: dict[Path, str]) -> list[BeforeAfter]:
    if arguments.before is None:
        return []
    befores = [_results_folder(Path(path)) for path in arguments.before]
    afters = [Path(path) for path in arguments.after or folders]
    found = []
    for number, (folder, after) in enumerate(zip(folders, afters)):
        before, results = befores[number % len(befores)], _results_folder(after)
        languages = arguments.languages or [x for x in languages_of(before) if x in languages_of(results)]
        if not languages:
            raise UserError(
                f"{at(results)}: holds no results of a language that {before} has, too; expected what clpl_moe.evaluate"
                f" writes, a folder per language with run.trec ({before} has {', '.join(languages_of(before)) or 'none'})"
            )
        for language in languages:
            found.append(
                compare_results(
                    names[folder],
                    before,
                    results,
                    language,
                    arguments.metric,
                    collection=arguments.collection,
                    examples=arguments.examples,
                    depth=arguments.passages,
                )
            )
    return found


def _page(arguments: ReportArguments, courses: list[RunCourse], comparisons: list[BeforeAfter], folder: Path) -> str:
    import jinja2

    from clpl_moe.report.charts import plot_before_after, plot_changes, plot_curves, plot_expert_load, save, svg

    def chart(figure: Figure, name: str, caption: str) -> Chart:
        save(figure, folder / f"{name}.png")
        figure.set_layout_engine("none")  # what was arranged once stays
        return Chart(name, caption, svg(figure, caption))

    course_charts = []
    for key, title, unit, caption in _CURVES:
        curves = [(course.name, points) for course in courses if (points := course.series(key))]
        if any(value for _, points in curves for _, value in points):  # a term that is not used is 0 throughout
            name = key.replace("@", "_at_")
            course_charts.append(chart(plot_curves(curves, title, unit), name, caption))
    load_charts = []
    for number, course in enumerate(courses, 1):
        steps, loads = course.expert_load()
        if steps:
            figure = plot_expert_load(steps, loads, course.moe_layers(len(loads[0])))
            load_charts.append(chart(figure, f"expert_load_{number}", course.name))
    items = []
    for number, comparison in enumerate(comparisons, 1):
        before, after = ([getattr(q, when) for q in comparison.queries] for when in ("before", "after"))
        metric, name = comparison.metric, f"{comparison.language}_{number}"
        gained, lost, same = comparison.counts()
        items.append(
            {
                "comparison": comparison,
                "cells": [
                    comparison.run,
                    comparison.language,
                    f"{len(comparison.queries):,}",
                    f"{comparison.mean('before'):.4f}",
                    f"{comparison.mean('after'):.4f}",
                    _signed(comparison.mean("after") - comparison.mean("before"), 4),
                    _error_change(comparison),
                    gained,
                    lost,
                    same,
                ],
                "charts": [
                    chart(
                        plot_before_after(before, after, metric),
                        f"before_after_{name}",
                        "Each point is one query or several: the larger, the more. Above the line: gained.",
                    ),
                    chart(
                        plot_changes([q.change for q in comparison.queries], metric),
                        f"changes_{name}",
                        f"Queries: {gained} gained, {lost} lost, {same} stayed the same.",
                    ),
                ],
            }
        )
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("clpl_moe.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"cut": cut, "signed": _signed, "rtl": is_right_to_left}
    return environment.get_template(PAGE).render(
        title=arguments.title or ", ".join([course.name for course in courses] or [c.run for c in comparisons]),
        version=__version__,
        metric=arguments.metric,
        courses=courses,
        facts=_facts(courses),
        course_charts=course_charts,
        load_charts=load_charts,
        comparisons=items,
        sizes={comparison.language: comparison.passages for comparison in comparisons},
        result_columns=[
            *("run", "language", "queries", f"{arguments.metric} before", f"{arguments.metric} after", "change"),
            *("change of the error", "queries gained", "lost", "same"),
        ],
    )


def _facts(courses: list[RunCourse]) -> list[tuple[str, list[str]]]:
    """What the runs were, a line for each fact that one of them has."""

    def fact(course: RunCourse, names: tuple[str, ...], form: str) -> str:
        values = [course.options.get(name) for name in names]
        if values[0] is None:
            return "–"
        return "none" if names[0] == "num_experts" and values[0] == 0 else form.format(*values)

    lines = [(title, [fact(course, names, form) for course in courses]) for title, names, form in _FACTS]
    ends = [next((r for r in reversed(c.records) if "train_runtime" in r), None) for c in courses]
    lines.append(("steps", [str(max((r.get("step", 0) for r in c.records), default=0)) for c in courses]))
    lines.append(("duration", ["–" if end is None else f"{end['train_runtime'] / 60:.1f} min" for end in ends]))
    return [(name, values) for name, values in lines if any(value != "–" for value in values)]


def _error_change(comparison: BeforeAfter) -> str:
    error = 1 - comparison.mean("before")
    if error <= 0:
        return "–"
    return f"{100 * ((1 - comparison.mean('after')) / error - 1):+.1f}%".replace("-", "−")


def _write_queries(path: Path, comparisons: list[BeforeAfter]) -> None:
    with atomic_open(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        metric = comparisons[0].metric
        writer.writerow(["run", "language", "query_id", "query", f"{metric} before", f"{metric} after", "change"])
        for c in comparisons:
            for q in sorted(c.queries, key=lambda query: (-query.change, query.id)):
                writer.writerow(
                    [c.run, c.language, q.id, q.text, f"{q.before:.6g}", f"{q.after:.6g}", f"{q.change:.6g}"]
                )


def cut(text: str, length: int) -> tuple[str, bool]:
    """The beginning of a text and whether something was cut off: at a space where there is one near, else where no
    character is torn from the marks that belong to it."""
    if len(text) <= length:
        return text, False
    end = text.rfind(" ", length // 2, length + 1)
    if end < 0:
        end = length
        # Vowel signs, the virama and joiners belong to the letter before; a letter after a joiner or virama does as well.
        while end < len(text) and (_clings(text[end]) or _binds(text[end - 1])):
            end += 1
    return text[:end].rstrip() + " …", True


def _clings(character: str) -> bool:
    return unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf")


def _binds(character: str) -> bool:
    return character == "\u200d" or unicodedata.combining(character) == 9  # joiner, virama


def is_right_to_left(text: str) -> bool:
    """Whether most letters are of a script written from right to left; the first one may well be a foreign name's."""
    directions = [unicodedata.bidirectional(character) for character in text]
    return sum(d in ("R", "AL") for d in directions) > sum(d == "L" for d in directions)


def _signed(value: float, digits: int) -> str:
    if round(value, digits) == 0:
        return f"{0:.{digits}f}"
    return f"{value:+.{digits}f}".replace("-", "−")
