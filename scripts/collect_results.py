"""Gather the metrics of an evaluation and the duration of its training into one JSON file, with the machine's description.

``python scripts/collect_results.py RESULTS_DIR RUN_DIR OUTPUT.json``
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path

from clpl_moe.files import write_json


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    import torch

    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


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
