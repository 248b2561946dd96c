"""The quickstart: a small encoder, trained on the Korean sample and evaluated before and after, on a CPU in minutes.

It trains by the packaged config ``quickstart``. An encoder that exists is not written again, and a run that was stopped goes
on where it stopped.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clpl_moe.common.api import takes_options
from clpl_moe.common.cli import read_config
from clpl_moe.common.errors import UserError, at
from clpl_moe.common.files import refuse_unwritable
from clpl_moe.common.output import refuse_taken, writing
from clpl_moe.evaluate import Evaluation, evaluate
from clpl_moe.quickstart.options import QuickstartArguments
from clpl_moe.small_encoder import small_encoder
from clpl_moe.train import TrainResult, train

if TYPE_CHECKING:
    from clpl_moe.train.verdict import Verdict

__all__ = ["Quickstart", "QuickstartArguments", "quickstart"]

_CONFIG = "quickstart"


@dataclass
class Quickstart:
    """What the quickstart made; printed, it is a table.

    Attributes:
        model: folder of the trained model.
        before: metric -> mean over the dev questions, with the small encoder.
        after: likewise, with the trained model.
        evaluation: all of the results, and the comparison of the two models.
        verdict: where training did not beat the small encoder, which the folder then holds.
    """

    model: Path
    before: dict[str, float]
    after: dict[str, float]
    evaluation: Evaluation
    verdict: Verdict | None = None

    def __str__(self) -> str:
        changes = [f"{name:<8} {self.before[name]:.4f} -> {self.after[name]:.4f}" for name in ("nDCG@5", "nDCG@10")]
        verdict = [] if self.verdict is None else ["", str(self.verdict)]
        return "\n".join([str(self.evaluation), "", *changes, *verdict])


@takes_options(QuickstartArguments)
def quickstart(arguments: QuickstartArguments) -> Quickstart:
    """Write the small encoder, train it on the Korean sample, evaluate both models on the sample's dev questions.

    Raises:
        UserError: the small encoder's weights cannot be had, or another folder is in the way of the run.
    """
    refuse_taken(arguments.output_dir, inside=True)  # whether the folder exists decides how training begins
    with writing(arguments.results, inside=True):
        return _quickstart(arguments)


def _quickstart(arguments: QuickstartArguments) -> Quickstart:
    path, config = read_config(_CONFIG)
    for name in ("dev_collection", "dev_language"):  # of a file in the current folder
        if not config.get(name):
            raise UserError(f"{at(path, field=name)}: missing, expected what both models are evaluated on")
    model, run = Path(arguments.model), Path(arguments.output_dir)
    if (model / "config.json").is_file():
        _tell(f"1 of 3: the encoder of {model}")
    else:
        if model.is_file() or (model.is_dir() and any(model.iterdir())):
            found = "no config.json" if model.is_dir() else "found a file"
            raise UserError(
                f"{at(model)}: {found}, expected a model folder, or none yet: the small encoder is written there"
            )
        refuse_unwritable(model)
        _tell(f"1 of 3: writing the small encoder to {model}")
        small_encoder(output=model)
    options: dict[str, Any] = {"model_name_or_path": arguments.model, "output_dir": arguments.output_dir}
    if arguments.max_steps is not None:
        options |= dict.fromkeys(("max_steps", "eval_steps", "save_steps"), arguments.max_steps)
    if run.exists():
        _tell(f"2 of 3: {run} exists: continuing it (remove the folder to start again)")
        options["resume_from_checkpoint"] = "true"
    else:
        _tell(f"2 of 3: training, to {run}")
    trained = train(config=_CONFIG, **options)
    assert isinstance(trained, TrainResult)  # no dry run
    _tell("3 of 3: evaluating before and after")
    evaluation = evaluate(
        model=[str(model), str(run)],
        collection=config["dev_collection"],
        languages=[config["dev_language"]],
        query_max_len=config.get("query_max_len"),
        passage_max_len=config.get("passage_max_len"),
        output=arguments.results,
        overwrite=True,
    )
    before, after = (result.metrics for result in evaluation.results)
    return Quickstart(run, before, after, evaluation, trained.verdict)


def _tell(step: str) -> None:
    print(step, file=sys.stderr, flush=True)
