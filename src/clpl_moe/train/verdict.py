"""What a run says where training did not beat the base model on the dev collection: what its records show, what to try."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clpl_moe.common.cli import command_name
from clpl_moe.data.lengths import percent
from clpl_moe.train.lengths import MOST_CUT
from clpl_moe.train.options import DEV_METRICS
from clpl_moe.train.plan import Plan

_AS_SIMILAR = 0.98  # a negative's similarity, as a share of the positive's
_FEW = 6  # records: fewer show no course
_GROWN = 1.5  # times that the gradient's norm was
_RISEN = 0.02  # of a mean cosine
_FALLS = 0.97  # last losses, as a share of those before


@dataclass
class Verdict:
    """That training did not beat its base model; ``str`` is the text for people.

    Attributes:
        metric: of the dev collection, by which both are compared.
        before: its value of the base model.
        after: of the best evaluation in training.
        step: of that evaluation.
        causes: likely ones, each with the figures of the run that show it, and an option to change.
        commands: to try next.
    """

    metric: str
    before: float
    after: float
    step: int
    causes: list[str]
    commands: list[str]

    def __str__(self) -> str:
        same = "does not differ from" if self.after == self.before else "is worse than"
        lines = [
            f"Training did not help: at its best (step {self.step:,}, {self.metric} {self.after:.4f}) the model {same} its"
            f" base model ({self.before:.4f})."
        ]
        lines += [f"- {cause}" for cause in self.causes] or ["- its records do not show why"]
        return "\n".join([*lines, "Try:", *(f"  {command}" for command in self.commands)])


def verdict_of(plan: Plan, records: Sequence[dict[str, Any]], folder: Path) -> Verdict | None:
    """Compare the evaluations of a run with the one before its first step; None where one is better, or one is missing.

    ``records`` are those of ``metrics.jsonl``; ``folder`` has the trained model.
    """
    args = plan.training_args
    name = (args.metric_for_best_model or "ndcg@10").removeprefix("eval_")
    found = [(record["step"], record[f"eval_{name}"]) for record in records if f"eval_{name}" in record]
    found = [(step, value) for step, value in found if isinstance(value, float)]
    before, trained = dict(found).get(0), [one for one in found if one[0] > 0]
    if before is None or not trained:
        return None
    sign = 1 if args.greater_is_better in (None, True) else -1
    step, after = max(trained, key=lambda one: sign * one[1])
    if sign * after > sign * before:
        return None
    steps = [record for record in records if "loss" in record]
    causes, changes = _causes(plan, steps, last_is_best=step == trained[-1][0])
    return Verdict(DEV_METRICS[name], before, after, step, causes, _commands(plan, folder, changes))


def _causes(plan: Plan, records: list[dict[str, Any]], last_is_best: bool) -> tuple[list[str], list[str]]:
    """What the lengths, and the course of losses and similarities, show; options that another run may have."""
    args, causes, changes = plan.training_args, [], []
    for option, texts in (("query_max_len", "queries"), ("passage_max_len", "passages")):
        if plan.lengths.share(option) > MOST_CUT:
            limit, share = plan.lengths.limits[option], percent(*plan.lengths.cut[option])
            causes.append(f"{share} of the {texts} were cut at {limit} tokens: raise {option}, or set it to 0")
            if option not in plan.lengths.from_data:
                changes += [f"--{option}", "0"]
    positive, negative = _course(records, "positive_similarity"), _course(records, "negative_similarity")
    if positive and negative and negative[0] >= _AS_SIMILAR * positive[0] > 0:
        causes.append(
            f"negatives were as similar to the query as its positive ({negative[0]:.3f} and {positive[0]:.3f}), and may"
            " answer it: mine again with a lower max_positive_ratio, or a guide"
        )
    if negative and negative[1] - negative[0] > _RISEN:
        causes.append(
            f"negatives became more similar to the query ({negative[0]:.3f} to {negative[1]:.3f}): mine again, from a higher"
            " rank_from, or lower penalty_weight"
        )
    loss, norm = _course(records, "loss"), _course(records, "grad_norm")
    higher = []
    if loss and loss[1] > loss[0]:
        higher.append(f"the loss rose ({loss[0]:.4f} to {loss[1]:.4f})")
    if norm and norm[1] > _GROWN * norm[0]:
        higher.append(f"the gradient's norm rose ({norm[0]:.2f} to {norm[1]:.2f})")
    if higher:
        causes.append(f"{' and '.join(higher)}: lower learning_rate")
        changes += ["--learning_rate", f"{args.learning_rate / 2:g}"]
    elif last_is_best and loss and loss[1] < _FALLS * loss[0]:
        causes.append(
            f"the loss was still falling ({loss[0]:.4f} to {loss[1]:.4f}) and the last evaluation is the best: train longer"
            f" than {plan.steps:,} steps"
        )
    return causes, changes


def _course(records: list[dict[str, Any]], name: str) -> tuple[float, float] | None:
    """The mean of the first third of a term's values, and of the last third; None where too few are known."""
    values = [record[name] for record in records if isinstance(record.get(name), int | float)]
    if len(values) < _FEW:
        return None
    third = len(values) // 3
    return sum(values[:third]) / third, sum(values[-third:]) / third


def _commands(plan: Plan, folder: Path, changes: list[str]) -> list[str]:
    args, model = plan.training_args, plan.model_args
    words = [
        *(str(folder), f"{folder}-merged", "--with", model.model_name_or_path),
        *(() if model.revision is None else ("--base_revision", model.revision)),
        *("--collection", str(args.dev_collection), "--languages", str(args.dev_language)),
        *(() if args.dev_split == "dev" else ("--split", args.dev_split)),
        *(word for option, tokens in plan.lengths.limits.items() for word in (f"--{option}", str(tokens))),
    ]
    commands = [f"{command_name('clpl_moe.merge')} {shlex.join(words)}"]
    if changes:
        again = ["--config", str(folder / "train_config.yaml"), "--output_dir", f"{folder}-2", *changes]
        commands.append(f"{command_name('clpl_moe.train')} {shlex.join(again)}")
    return commands
