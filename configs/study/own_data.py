"""What the README's commands for data of one's own do to each set: nDCG on its dev questions, before and after.

    python configs/study/own_data.py DATA WORK OUTPUT.json [--sets parsinlu_fa ...] [--config small-encoder] [options of train]

DATA holds the sets as `prepare_sets.py` names them. Each goes through `prepare`, `mine` and `train`, in folders of WORK; a set
with train queries alone is divided as `prepare_sets.py` does. OUTPUT gets a set as soon as it is done, and a second call goes on
with the others. The base model is a candidate, and the dev questions choose among candidates: gains are a little too good, and
no figure can be below the base model's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from prepare_sets import BEIR, SQUAD, TRAIN_ONLY, from_train, write

from clpl_moe.common.files import write_json
from clpl_moe.common.machine import machine, versions

MODEL = "models/small-encoder"
# The small ones first: they are what goes wrong.
SETS = sorted({*SQUAD, *BEIR, *TRAIN_ONLY} - {"xquad_hi"}, key=lambda name: (name in ("hiquad_hi", "pquad_fa"), name))


def command(verb: str, *words: object) -> None:
    subprocess.run([sys.executable, "-m", f"clpl_moe.{verb}", *map(str, words)], check=True)


def run(name: str, data: Path, work: Path, config: str, options: list[str]) -> dict[str, Any]:
    """Prepare, mine and train; what was compared, by the share of the trained weights."""
    language = next(part for part in name.split("_") if part in ("ko", "fa", "hi"))
    collection, triplets, folder = work / "collections" / name, work / f"{name}.jsonl", work / "runs" / name
    if not collection.exists():
        if name in TRAIN_ONLY:
            write(collection / language, *from_train(data / name))
        else:
            source = ("--squad", data / f"{name}.json") if name in SQUAD else ("--beir", data / name)
            command("prepare", *source, "--language", language, "--output", collection)
    if not triplets.exists():
        mined = ("--collection", collection, "--language", language, "--output", triplets)
        command("mine", "--model", MODEL, *mined, "--max_positive_ratio", 0.98)
    start = time.time()
    again = ("--resume_from_checkpoint", "true") if list(folder.glob("checkpoint-*")) else ()
    dev = ("--dev_collection", collection, "--dev_language", language, "--output_dir", folder)
    command("train", "--config", config, "--train_data", triplets, *dev, *again, *options)
    record = json.loads((folder / "merge.json").read_text(encoding="utf-8"))
    metrics = {candidate["alpha"]: candidate["metrics"] for candidate in record["candidates"]}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = max(line["step"] for line in lines if "loss" in line)
    kept = {"alpha": record["alpha"], "before": metrics[0.0], "after": metrics[record["alpha"]]}
    return kept | {"steps": steps, "seconds": round(time.time() - start), "candidates": record["candidates"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--sets", nargs="+", default=SETS, choices=SETS)
    parser.add_argument("--config", default="small-encoder")
    arguments, options = parser.parse_known_args()
    found: dict[str, Any] = {"machine": machine(), "versions": versions(), "config": arguments.config, "sets": {}}
    if arguments.output.exists():
        found["sets"] = json.loads(arguments.output.read_text(encoding="utf-8"))["sets"]
    for name in arguments.sets:
        if name not in found["sets"]:
            found["sets"][name] = run(name, arguments.data, arguments.work, arguments.config, options)
            write_json(arguments.output, found)
    for name, one in found["sets"].items():
        print(f"{name:<14} {one['before']['nDCG@10']:.4f} -> {one['after']['nDCG@10']:.4f}  alpha {one['alpha']:g}")


if __name__ == "__main__":
    main()
