"""``python -m clpl_moe.train``: fine-tune an encoder with CLPL and experts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

PROG = "clpl_moe.train"
DESCRIPTION = "Fine-tune an encoder for retrieval with contrastive learning penalty loss and mixture-of-experts layers."

# The parser's own output: building it takes the imports of FlagEmbedding and transformers, several seconds.
HELP_FILE = Path(__file__).parent / "help.txt"


def help_text() -> str:
    """What ``--help`` shows, from the parser itself; ``scripts/update_help.py`` stores it in :data:`HELP_FILE`."""
    from clpl_moe.common.cli import make_parser
    from clpl_moe.train.arguments import CLPLDataArguments, CLPLModelArguments, CLPLTrainingArguments

    return make_parser([CLPLModelArguments, CLPLDataArguments, CLPLTrainingArguments], PROG, DESCRIPTION).format_help()


def train(argv: Sequence[str] | None = None) -> None:
    """Train as the command line ``argv`` says.

    Raises:
        UserError: a mistake in the options or the data.
    """
    from clpl_moe.common.cli import parse
    from clpl_moe.train.arguments import CLPLDataArguments, CLPLModelArguments, CLPLTrainingArguments

    model_args, data_args, training_args = parse(
        [CLPLModelArguments, CLPLDataArguments, CLPLTrainingArguments], PROG, DESCRIPTION, argv
    )
    if training_args.dry_run:
        from clpl_moe.train.plan import make_plan
        from clpl_moe.train.resume import check_output_dir

        check_output_dir(training_args)
        print(make_plan(model_args, data_args, training_args))
        return
    from clpl_moe.train.runner import CLPLRunner

    CLPLRunner(model_args, data_args, training_args).run()
