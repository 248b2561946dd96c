"""What a run comes back with."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clpl_moe.common.cli import command_name

if TYPE_CHECKING:
    from clpl_moe.train.plan import Plan


@dataclass
class TrainResult:
    """A finished run; ``str`` is the text for people.

    Attributes:
        folder: the run folder, which holds the model.
        before: nDCG@5, nDCG@10 and R@100 of the base model on the dev collection; None where it was not evaluated.
        after: the metrics of the saved model; None where it was not evaluated.
        best_checkpoint: of ``metric_for_best_model``; None without evaluation.
        metrics_file: ``metrics.jsonl``, the course of the run.
        plan: what the run was.
    """

    folder: Path
    before: dict[str, float] | None
    after: dict[str, float] | None
    best_checkpoint: Path | None
    metrics_file: Path
    plan: Plan

    def __str__(self) -> str:
        lines = [
            f"saved to {self.folder}: the model, its card README.md, {self.metrics_file.name} and train_config.yaml"
        ]
        if self.after is not None:
            names = list(self.after)
            lines.append(f"{'':<10}" + "".join(f"{name:>10}" for name in names))
            for label, metrics in (("before", self.before), ("after", self.after)):
                if metrics is not None:
                    lines.append(f"{label:<10}" + "".join(f"{metrics[name]:>10.4f}" for name in names))
        return "\n".join([*lines, f"Next: {self.next_command()}"])

    def next_command(self) -> str:
        """The command that compares the trained model with its base model."""
        args, data = self.plan.training_args, self.plan.data_args
        if args.dev_collection is not None:
            collection, language, split = args.dev_collection, args.dev_language, args.dev_split
        else:  # the corpus that was mined from, or none that is known
            collection, language, split = args.ance_collection or "COLLECTIONS", args.ance_language or "LANGUAGE", "dev"
        words = [
            *("--model", self.plan.model_args.model_name_or_path, str(self.folder)),
            *("--collection", collection, "--languages", str(language)),
            *(() if split == "dev" else ("--split", split)),
            *("--query_max_len", str(data.query_max_len), "--passage_max_len", str(data.passage_max_len)),
            *("--output", str(Path("results", self.folder.name))),
        ]
        return f"{command_name('clpl_moe.evaluate')} {shlex.join(words)}"
