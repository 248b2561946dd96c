"""Gather the metrics of an evaluation and the duration of its training into one JSON file, with the machine's description.

``python scripts/collect_results.py RESULTS_DIR RUN_DIR OUTPUT.json``
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from clpl_moe.files import write_json

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from common import machine


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
    records = [json.loads(line) for line in (args.run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    training = next(record for record in reversed(records) if "train_runtime" in record)
    write_json(args.output, {"machine": machine(), "training": training, "evaluations": evaluations})
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
