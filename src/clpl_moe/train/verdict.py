"""What a run says where training did not beat the base model on the dev collection: what its records show, what to try."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clpl_moe.common.cli import command_name
from clpl_moe.data.lengths import percent
from clpl_moe.train.lengths import MOST_CUT
from clpl_moe.train.options import DEV_METRICS
from clpl_moe.train.plan import Plan

if TYPE_CHECKING:
    from clpl_moe.train import TrainResult

_MOST_CAUSES = 3
_NEARLY = 0.98  # a negative's similarity, as a share of the positive's
_FEW = 6  # records: fewer show no course
_GROWN = 1.5  # times that the gradient's norm was
_RISEN = 0.02  # of a mean cosine
_FALLS = 0.97  # last losses, as a share of those before
_SHARES = ("0.5", "0.75")  # of the trained weights, to try


@dataclass
class Verdict:
    """That training did not beat its base model; ``str`` is the text for people.

    Attributes:
        metric: of the dev collection, by which both are compared.
        before: its value of the base model.
        after: of the trained model, or of the best mixture of both.
        step: of the trained model.
        queries: that decide.
        one_query: the most that one of them can change.
        holds: what the run folder holds, where it is not the trained model.
        causes: likely ones, three at most, each with the figures of the run that show it.
        commands: to try next; one at most.
    """

    metric: str
    before: float
    after: float
    step: int
    queries: int
    one_query: float
    holds: str | None
    causes: list[str]
    commands: list[str]

    def __str__(self) -> str:
        figures = f"{self.before:.4f} before and after" if self.after == self.before else None
        figures = figures or f"{self.before:.4f} before, {self.after:.4f} after"
        lines = [
            f"Training did not help: {self.metric} {figures} (step {self.step:,}, {self.queries:,} dev questions)."
        ]
        if self.nothing_to_gain:
            lines.append("These questions are too easy to show a gain: take more of them, or more passages.")
        elif 0 < abs(self.before - self.after) <= self.one_query:
            lines.append("One question can make this difference.")
        lines += [f"- {cause}" for cause in self.causes]
        lines += [] if self.holds is None else [self.holds]
        return "\n".join([*lines, *(f"Try: {command}" for command in self.commands)])

    @property
    def nothing_to_gain(self) -> bool:
        """Whether the base model finds all that is to be found."""
        return self.before >= 1


def verdict_of(result: TrainResult, records: Sequence[dict[str, Any]], step: int, checkpoint: Path) -> Verdict | None:
    """Compare the model of a run, trained for ``step`` steps, and its mixtures with the base model; None where one is better,
    or nothing can be compared.

    ``records`` are those of ``metrics.jsonl``; ``checkpoint`` has the trained model where the run folder has not.
    """
    plan, args = result.plan, result.plan.training_args
    metric = DEV_METRICS[(args.metric_for_best_model or "ndcg@10").removeprefix("eval_")]
    sign = 1 if args.greater_is_better in (None, True) else -1
    values = [metrics[metric] for alpha, metrics in result.candidates.items() if alpha > 0]
    if result.before is None or not values:
        return None
    before, after = result.before[metric], max(values, key=lambda value: sign * value)
    if sign * after > sign * before:
        return None
    holds = None
    if result.alpha == 0:
        holds = f"{result.folder} holds the base model, {checkpoint} the trained one."
    counts = [len(collection.qrels) for collection in plan.dev]
    one_query = 1 / (len(counts) * min(counts))
    verdict = Verdict(metric, before, after, step, sum(counts), one_query, holds, [], [])
    if not verdict.nothing_to_gain:
        causes = _causes(plan, [record for record in records if "loss" in record], still=step == plan.steps)
        verdict.causes = [cause for cause, _ in causes[:_MOST_CAUSES]]
        changes = [word for _, words in causes[:_MOST_CAUSES] for word in words]
        verdict.commands = [_command(result, checkpoint if result.alpha == 0 else result.folder, changes)]
    return verdict


def _causes(plan: Plan, records: list[dict[str, Any]], still: bool) -> list[tuple[str, list[str]]]:
    """What the lengths, and the course of losses and similarities, show, each with options that another run may have; ``still``:
    the best model is the last one."""
    causes: list[tuple[str, list[str]]] = []
    for option, texts in (("passage_max_len", "passages"), ("query_max_len", "queries")):
        if plan.lengths.share(option) > MOST_CUT:
            words = [] if option in plan.lengths.from_data else [f"--{option}", "0"]
            share, limit = percent(*plan.lengths.cut[option]), plan.lengths.limits[option]
            causes.append((f"{share} of the {texts} are cut at {limit} tokens: raise {option}", words))
    loss, norm = _course(records, "loss"), _course(records, "grad_norm")
    higher = []
    if loss and loss[1] > loss[0]:
        higher.append(f"the loss rose ({loss[0]:.4f} to {loss[1]:.4f})")
    if norm and norm[1] > _GROWN * norm[0]:
        higher.append(f"the gradient grew ({norm[0]:.2f} to {norm[1]:.2f})")
    if higher:
        halved = f"{plan.training_args.learning_rate / 2:g}"
        causes.append((f"{' and '.join(higher)}: lower learning_rate", ["--learning_rate", halved]))
    positive, negative = _course(records, "positive_similarity"), _course(records, "negative_similarity")
    if positive and negative and negative[0] >= _NEARLY * positive[0] > 0:
        figures = f"negatives are as similar as positives ({negative[0]:.3f}, {positive[0]:.3f})"
        causes.append((f"{figures}: mine with a lower max_positive_ratio, or a guide", []))
    if negative and negative[1] - negative[0] > _RISEN:
        figures = f"negatives became more similar ({negative[0]:.3f} to {negative[1]:.3f})"
        causes.append((f"{figures}: mine from a higher rank_from", []))
    if still and not higher and loss and loss[1] < _FALLS * loss[0]:
        figures = f"the loss still fell ({loss[0]:.4f} to {loss[1]:.4f})"
        causes.append((f"{figures}: train more than {plan.steps:,} steps", []))
    return causes


def _course(records: list[dict[str, Any]], name: str) -> tuple[float, float] | None:
    """The mean of the first third of a term's values, and of the last third; None where too few are known."""
    values = [record[name] for record in records if isinstance(record.get(name), int | float)]
    if len(values) < _FEW:
        return None
    third = len(values) // 3
    return sum(values[:third]) / third, sum(values[-third:]) / third


def _command(result: TrainResult, trained: Path, changes: list[str]) -> str:
    """Another run, where its records show what to change; else a mixture with the base model; where that has been tried, a
    look at the data."""
    plan, folder = result.plan, result.folder
    args, model = plan.training_args, plan.model_args
    if changes:
        again = ["--config", str(folder / "train_config.yaml"), "--output_dir", f"{folder}-2", *changes]
        again += ["--merge_base_alpha", *_SHARES]
        return f"{command_name('clpl_moe.train')} {shlex.join(again)}"
    if args.shares:
        return f"{command_name('clpl_moe.validate')} {shlex.join(['--config', str(folder / 'train_config.yaml')])}"
    words = [
        *(str(trained), f"{folder}-merged", "--with", model.model_name_or_path),
        *(() if model.revision is None else ("--base_revision", model.revision)),
        *("--collection", str(args.dev_collection), "--languages", *args.dev_languages),
        *(() if args.dev_split == "dev" else ("--split", args.dev_split)),
        *(word for option, tokens in plan.lengths.limits.items() for word in (f"--{option}", str(tokens))),
    ]
    return f"{command_name('clpl_moe.merge')} {shlex.join(words)}"
