"""``clpl-moe VERB ...``, or ``python -m clpl_moe VERB ...``: every command of the package."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from clpl_moe import __version__
from clpl_moe.common.cli import called_as, nearest
from clpl_moe.common.errors import UserError, command

# In the order in which they are used. Each is a module that `python -m clpl_moe.VERB` runs, too.
VERBS = {
    "quickstart": "train a small encoder on the Korean sample and show nDCG before and after",
    "prepare": "turn MIRACL, BEIR's layout or SQuAD-shaped files into a collection",
    "convert": "write training data or a collection in the format of another tool",
    "encode": "encode corpora ahead of mine and evaluate, on several machines at once",
    "mine": "mine hard negatives and the queries that they answer: training data",
    "synthesize": "have a language model write queries for negatives that have none",
    "judge": "have a language model find the negatives that answer their query",
    "validate": "list every fault of training data, and describe them",
    "train": "fine-tune an encoder with CLPL and mixture-of-experts layers",
    "evaluate": "retrieve with one or more models and compare them",
    "merge": "merge experts into dense layers, and a tuned model with its base model",
    "export": "write a model with a smaller vocabulary, as an ONNX graph, and upload it",
    "check": "show whether other tools give a model folder's embeddings, and with which call",
    "ablate": "train and evaluate rows of options on several languages and seeds",
    "report": "make a page of runs: their course, and each query before and after",
    "card": "put results into the model card of a run",
    "small_encoder": "write a small multilingual encoder for a CPU",
}


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that the first word of ``argv`` names, with the rest of it."""
    argv = list(sys.argv[1:] if argv is None else argv)
    program = "python -m clpl_moe" if Path(sys.argv[0]).name == "__main__.py" else "clpl-moe"
    verb = argv[0].replace("-", "_") if argv and not argv[0].startswith("-") else None
    if verb in VERBS:
        called_as(program)
        sys.argv[1:] = argv[1:]
        runpy.run_module(f"clpl_moe.{verb}", run_name="__main__", alter_sys=True)
    elif not argv or argv[0] in ("-h", "--help", "help"):
        print(_help(program))
    elif argv[0] == "--version":
        print(f"clpl-moe {__version__}")
    else:
        raise UserError(f"unknown command '{argv[0]}'{nearest(verb or argv[0], VERBS, '; --help lists the commands')}")


def _help(program: str) -> str:
    width = max(map(len, VERBS))
    commands = "\n".join(f"  {verb:<{width}}  {description}" for verb, description in VERBS.items())
    return f"""usage: {program} COMMAND [--config FILE.yaml] [--option value ...]

Fine-tune encoders for retrieval with a contrastive learning penalty loss and mixture-of-experts layers.

{commands}

{program} COMMAND --help lists the options of a command; {program} --version prints the version."""


if __name__ == "__main__":
    main()
