"""The command ``python -m clpl_moe.evaluate``."""

from clpl_moe.common.api import command_of
from clpl_moe.evaluate import Evaluation, evaluate


@command_of(evaluate, "Retrieve from collections with one or more models; write run files, metrics and comparisons.")
def main(evaluation: Evaluation) -> None:
    if evaluation.results:  # of several processes only the first one has them
        print(f"{evaluation}\n\nvalues of each query: {evaluation.table}")


if __name__ == "__main__":
    main()
