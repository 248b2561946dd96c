"""The page of a report: its pictures and its HTML."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from clpl_moe import __version__
from clpl_moe.report.before_after import BeforeAfter
from clpl_moe.report.course import RunCourse, series
from clpl_moe.report.options import ReportArguments
from clpl_moe.report.text import cut, is_right_to_left, percent, signed

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


def render_page(
    arguments: ReportArguments, courses: list[RunCourse], comparisons: list[BeforeAfter], folder: Path
) -> str:
    """The page; its pictures are also written into ``folder``, as PNG."""
    import jinja2

    from clpl_moe.report.charts import plot_before_after, plot_changes, plot_curves, plot_expert_load, save, svg

    def chart(figure: Figure, name: str, caption: str) -> dict[str, str]:
        save(figure, folder / f"{name}.png")
        figure.set_layout_engine("none")  # what was arranged once stays
        return {"caption": caption, "svg": svg(figure, caption)}

    course_charts = []
    for key, title, unit, caption in _CURVES:
        curves = [(course.name, points) for course in courses if (points := series(course.records, key))]
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
        scatter = plot_before_after(before, after, metric)
        bars = plot_changes([q.change for q in comparison.queries], metric)
        says = "Each point is one query or several: the larger, the more. Above the line: gained."
        counted = f"Queries: {gained} gained, {lost} lost, {same} stayed the same."
        items.append(
            {
                "comparison": comparison,
                "charts": [chart(scatter, f"before_after_{name}", says), chart(bars, f"changes_{name}", counted)],
                "cells": {
                    "run": comparison.run,
                    "language": comparison.language,
                    "queries": f"{len(comparison.queries):,}",
                    f"{metric} before": f"{comparison.mean('before'):.4f}",
                    f"{metric} after": f"{comparison.mean('after'):.4f}",
                    "change": signed(comparison.mean("after") - comparison.mean("before"), 4),
                    "change of the error": percent(comparison.error_change),
                    "queries gained": gained,
                    "lost": lost,
                    "same": same,
                },
            }
        )
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.loader, environment.undefined = jinja2.PackageLoader("clpl_moe.report"), jinja2.StrictUndefined
    environment.filters |= {"cut": cut, "signed": signed, "rtl": is_right_to_left}
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
    )


def _facts(courses: list[RunCourse]) -> list[tuple[str, list[str]]]:
    """What the runs were, a line for each fact that one of them has."""

    def fact(course: RunCourse, names: tuple[str, ...], form: str) -> str:
        values = [course.options.get(name) for name in names]
        if values[0] is None:
            return "–"
        return "none" if names[0] == "num_experts" and values[0] == 0 else form.format(*values)

    lines = [(title, [fact(course, names, form) for course in courses]) for title, names, form in _FACTS]
    lines.append(("steps", [str(max((r.get("step", 0) for r in c.records), default=0)) for c in courses]))
    lines.append(("duration", [f"{c.end['train_runtime'] / 60:.1f} min" if c.end else "–" for c in courses]))
    return [(name, values) for name, values in lines if any(value != "–" for value in values)]
