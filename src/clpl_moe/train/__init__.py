"""Training: fine-tune an encoder for retrieval with the contrastive learning penalty loss and mixture-of-experts layers.

The options are FlagEmbedding's and transformers', with those of :mod:`clpl_moe.train.options` in front. A run leaves the
model, ``train_config.yaml``, ``metrics.jsonl``, the model card and checkpoints in ``output_dir``, and resumes exactly.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from clpl_moe.common.api import takes_options
from clpl_moe.train.options import OPTIONS
from clpl_moe.train.result import TrainResult

if TYPE_CHECKING:
    from clpl_moe.train.arguments import CLPLDataArguments, CLPLModelArguments, CLPLTrainingArguments
    from clpl_moe.train.plan import Plan

logger = logging.getLogger(__name__)

__all__ = ["TrainResult", "train"]


def all_options() -> list[type]:
    """The dataclasses of every option; their parents take seconds to import."""
    from clpl_moe.train.arguments import CLPLDataArguments, CLPLModelArguments, CLPLTrainingArguments

    return [CLPLModelArguments, CLPLDataArguments, CLPLTrainingArguments]


@takes_options(all_options, shown=OPTIONS)
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
    from clpl_moe.train.runner import CLPLRunner

    return CLPLRunner(model_args, data_args, training_args).run(on_plan)
