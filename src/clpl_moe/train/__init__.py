"""Training: fine-tune an encoder for retrieval with the contrastive learning penalty loss and mixture-of-experts layers.

The options are FlagEmbedding's and transformers', with those of :mod:`clpl_moe.train.options` in front. A run leaves the
model, ``train_config.yaml``, ``metrics.jsonl``, the model card and checkpoints in ``output_dir``, and resumes exactly.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from clpl_moe.common.api import takes_options
from clpl_moe.common.cli import command_name
from clpl_moe.common.files import naming_a_full_disk
from clpl_moe.common.output import writing
from clpl_moe.train.options import OPTIONS

if TYPE_CHECKING:
    from clpl_moe.train.arguments import CLPLDataArguments, CLPLModelArguments, CLPLTrainingArguments
    from clpl_moe.train.plan import Plan
    from clpl_moe.train.verdict import Verdict

logger = logging.getLogger(__name__)

__all__ = ["TrainResult", "train"]

# In docs/study.md sets with fewer dev questions than this rose by a point or two on them, and not on others.
_FEW_QUESTIONS = 150


@dataclass
class TrainResult:
    """A finished run; ``str`` is the text for people.

    Attributes:
        folder: the run folder, which holds the model.
        before: nDCG@5, nDCG@10 and R@100 of the base model on the dev collection; None where it was not evaluated.
        after: the metrics of the saved model; None where it was not evaluated.
        best_checkpoint: of ``metric_for_best_model``, the base model left aside; None without evaluation.
        metrics_file: ``metrics.jsonl``, the course of the run.
        plan: what the run was.
        experts: with ``merge_experts``, the folder of the trained model with its experts; the run folder has them merged.
        with_experts: the metrics of that model; None where it was not evaluated.
        merged: with ``merge_adapter``, the folder of the model with its adapter merged.
        alpha: share of the trained weights in the saved model. 1: it is the trained model; 0: the base model, which no other
            candidate beats on the dev collection; between: a mixture, of ``merge_base_alpha``.
        candidates: share of the trained weights -> metrics, of those that were compared.
        verdict: where training did not beat the base model on the dev collection: likely causes, and what to try.
    """

    folder: Path
    before: dict[str, float] | None
    after: dict[str, float] | None
    best_checkpoint: Path | None
    metrics_file: Path
    plan: Plan
    experts: Path | None = None
    with_experts: dict[str, float] | None = None
    merged: Path | None = None
    alpha: float = 1.0
    candidates: dict[float, dict[str, float]] = field(default_factory=dict)
    verdict: Verdict | None = None

    def __str__(self) -> str:
        mixed = "" if self.alpha == 1 else f", mixed with its base model (alpha {self.alpha:g})"
        what = f"the model{'' if self.experts is None else ' with its experts merged'}{mixed}"
        what = what if self.alpha else "the base model, as no candidate is better"
        lines = [f"saved to {self.folder}: {what}, its card README.md, {self.metrics_file.name} and train_config.yaml"]
        if self.experts is not None:
            lines.append(f"saved to {self.experts}: the trained model with its experts")
        if self.merged is not None:
            lines.append(f"saved to {self.merged}: the model with its adapter merged")
        if self.after is not None:
            names = list(self.after)
            rows = {"before": self.before} | {f"alpha {share:g}": found for share, found in self.candidates.items()}
            rows = {label: found for label, found in rows.items() if label != "alpha 0"}
            rows["after" if self.alpha == 1 else "trained"] = rows.pop("alpha 1", None)
            if self.experts is not None:
                rows = {"before": rows.pop("before"), "experts": self.with_experts} | rows
                rows["merged"] = rows.pop("after" if self.alpha == 1 else "trained")
            lines.append(f"{'':<10}" + "".join(f"{name:>10}" for name in names))
            for label, metrics in rows.items():
                if metrics is not None:
                    lines.append(f"{label:<10}" + "".join(f"{metrics[name]:>10.4f}" for name in names))
        if self.verdict is not None:
            return "\n".join([*lines, "", str(self.verdict)])
        questions = sum(len(collection.qrels) for collection in self.plan.dev)
        if self.before is not None and questions < _FEW_QUESTIONS:
            lines.append(
                f"{questions:,} dev questions are few, and they chose the best candidate: the gain may be chance. The next"
                " command tests it; more questions show more."
            )
        return "\n".join([*lines, f"Next: {self.next_command()}"])

    def next_command(self) -> str:
        """The command that compares the trained model with its base model."""
        args, data = self.plan.training_args, self.plan.data_args
        if args.dev_collection is not None:
            collection, languages, split = args.dev_collection, args.dev_languages, args.dev_split
        else:  # the corpus that was mined from, or none that is known
            collection, languages, split = (
                args.ance_collection or "COLLECTIONS",
                [args.ance_language or "LANGUAGE"],
                "dev",
            )
        words = [
            *("--model", self.plan.model_args.model_name_or_path, str(self.folder)),
            *(() if self.plan.model_args.revision is None else ("--revision", self.plan.model_args.revision)),
            *("--collection", collection, "--languages", *languages),
            *(() if split == "dev" else ("--split", split)),
            *("--query_max_len", str(data.query_max_len), "--passage_max_len", str(data.passage_max_len)),
            *("--output", str(Path("results", self.folder.name))),
        ]
        return f"{command_name('clpl_moe.evaluate')} {shlex.join(words)}"


def all_options() -> list[type]:
    """The dataclasses of every option; their parents take seconds to import."""
    from clpl_moe.train.arguments import CLPLDataArguments, CLPLModelArguments, CLPLTrainingArguments

    return [CLPLModelArguments, CLPLDataArguments, CLPLTrainingArguments]


@takes_options(all_options, shown=list(OPTIONS.values()))
def train(
    model_args: CLPLModelArguments,
    data_args: CLPLDataArguments,
    training_args: CLPLTrainingArguments,
    on_plan: Callable[[Plan], None] | None = None,
) -> TrainResult | Plan:
    """Train, from the beginning or from a checkpoint; with ``dry_run``, check config and data and return the plan.

    Keyword arguments are the options of ``python -m clpl_moe.train --help``, FlagEmbedding's and transformers' among
    them; ``config`` names a YAML file of options. Under ``torchrun`` the first process writes, and all return.

    Raises:
        UserError: a mistake in the options or the data, before anything is written.
    """
    if ignored := [*model_args.without_effect, *training_args.without_effect]:
        logger.warning("without any effect in this training, and ignored: %s", ", ".join(ignored))
    if training_args.dry_run:
        from clpl_moe.train.dry_run import plan_run
        from clpl_moe.train.resume import check_output_dir

        check_output_dir(training_args)
        return plan_run(model_args, data_args, training_args)
    with writing(training_args.folder, inside=True), naming_a_full_disk(training_args.folder / "checkpoint"):
        from clpl_moe.train.runner import CLPLRunner  # which takes seconds
        from clpl_moe.train.stopping import lost_processes_named

        with lost_processes_named():
            return CLPLRunner(model_args, data_args, training_args).run(on_plan)
