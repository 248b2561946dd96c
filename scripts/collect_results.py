"""Gather the metrics of an evaluation and the duration of its training into one JSON file, with the machine's description.

``python scripts/collect_results.py RESULTS_DIR RUN_DIR OUTPUT.json``
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from clpl_moe.common.files import write_json
from clpl_moe.common.machine import machine
from clpl_moe.train.metrics_file import read_metrics


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("results", "run", "output"):
        parser.add_argument(name, type=Path)
    args = parser.parse_args()
    evaluations = {
        str(path.parent.relative_to(args.results)): json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(args.results.rglob("metrics.json"))
    }
    for evaluation in evaluations.values():
        # Names only: the folders lie elsewhere on other machines.
        for key in ("model", "collection"):
            evaluation[key] = Path(evaluation[key]).name
    training = next(r for r in reversed(read_metrics(args.run / "metrics.jsonl")) if "train_runtime" in r)
    write_json(args.output, {"machine": machine(), "training": training, "evaluations": evaluations})
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
