"""Figures of each set, without the values of queries, from what merged.py and sentence_transformers_rows.py wrote.

    python configs/study/compact.py merged MERGED.jsonl OUTPUT.json MACHINE [RUN ...]
    python configs/study/compact.py sentence_transformers OUTPUT.json MACHINE LINES.jsonl ...

MACHINE is a `run.json` of `ablate` from the same machine. Of merged models, each set has its nDCG@5, its difference to the base
model, and the interval that 95% of 10,000 bootstrap draws of queries have. A model whose experts are given has a further line,
`given`: each set with the expert of its language or its own. Groups of sets have the mean of their sets' changes.
RUN is the folder of a further run of `mix.yaml`, whose model was not kept: it gets a line without intervals.
"""

from __future__ import annotations

import csv
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from clpl_moe.common.files import write_json

Line = dict[str, Any]
UNSEEN = (
    "ko_miracl",
    "fa_miracl",
    "hi_miracl",
    "parsinlu_fa",
)  # questions asked by people who had not seen the passage


def read(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def machine(path: Path) -> Line:
    run = json.loads(path.read_text(encoding="utf-8"))
    return {"machine": run["machine"], "versions": run["versions"]}


def experts_of_sets() -> dict[str, dict[str, int]]:
    """Rows of mix.yaml with given experts: set -> expert."""
    config = yaml.safe_load(Path(__file__).with_name("mix.yaml").read_text(encoding="utf-8"))
    names = [Path(path).stem for path in config["train"]["train_data"]]
    rows = {name: (row.get("train") or {}).get("experts_of_data") for name, row in config["rows"].items()}
    return {name: dict(zip(names, experts, strict=True)) for name, experts in rows.items() if experts}


def given(lines: list[Line]) -> list[Line]:
    """Of each model whose experts are given, one line with the expert that each set has."""
    made = []
    for row, experts in experts_of_sets().items():
        of_row = [line for line in lines if line["run"].startswith(f"{row}-") and line["form"].startswith("expert ")]
        for run in dict.fromkeys(line["run"] for line in of_row):
            by_expert = {int(line["form"].split()[1]): line for line in of_row if line["run"] == run}
            line: Line = {"run": run, "form": "given", "alpha": 1.0}
            for part in ("sets", "queries"):
                line[part] = {name: by_expert[expert][part][name] for name, expert in experts.items()}
            made.append(line)
    return made


def change(line: Line, base: Line, draws: dict[str, np.ndarray]) -> Line:
    """Mean over some sets of what their queries gain, with an interval."""
    gaps = {name: np.array(line["queries"][name]) - np.array(base["queries"][name]) for name in draws}
    samples = np.mean([gaps[name][drawn].mean(axis=1) for name, drawn in draws.items()], axis=0)
    low, high = np.quantile(samples, [0.025, 0.975])
    mean = statistics.fmean(of.mean() for of in gaps.values())
    return {"change": round(float(mean), 4), "interval": [round(float(low), 4), round(float(high), 4)]}


def of_run(folder: Path, base: Line) -> Line:
    """A line of a run of `ablate`."""
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    sets: dict[str, list[float]] = {}
    with (folder / "results/per_query.csv").open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            value = next(value for name, value in line.items() if name.partition(" ")[0] == "nDCG@5")
            sets.setdefault(line["query_id"].partition("/")[0], []).append(float(value))
    means = {name: statistics.fmean(sets[name]) for name in base["sets"]}
    changes = {name: mean - base["sets"][name]["nDCG@5"] for name, mean in means.items()}
    out: Line = {"row": run["row"], "seed": run["seed"], "form": "trained, without intervals", "alpha": 1.0}
    out["mean of sets"] = round(statistics.fmean(means.values()), 4)
    return out | {"sets": {n: {"nDCG@5": round(m, 4), "change": round(changes[n], 4)} for n, m in means.items()}}


def merged(source: Path, output: Path, of_machine: Path, *runs: Path) -> None:
    lines = read(source)
    base = next(line for line in lines if line["run"] == "base")
    dense = next(line for line in lines if line["run"].startswith("ffn-all-seed1") and line["alpha"] == 1)
    rng = np.random.default_rng(1)
    draws = {name: rng.integers(len(v), size=(10_000, len(v)), dtype=np.int32) for name, v in base["queries"].items()}
    groups = {"all": list(draws), "asked unseen": UNSEEN, "others": [name for name in draws if name not in UNSEEN]}
    found = []
    for line in lines + given(lines):
        row, _, rest = line["run"].partition("-all-seed")
        out = {
            "row": row,
            "seed": int(rest.partition("-")[0]) if rest else None,
            **{k: line[k] for k in ("form", "alpha")},
        }
        out["mean of sets"] = round(statistics.fmean(of["nDCG@5"] for of in line["sets"].values()), 4)
        out["groups"] = {group: change(line, base, {n: draws[n] for n in names}) for group, names in groups.items()}
        out["all, against dense"] = change(line, dense, draws)
        out["sets"] = {
            name: {"nDCG@5": round(line["sets"][name]["nDCG@5"], 4), **change(line, base, {name: drawn})}
            for name, drawn in draws.items()
        }
        found.append(out)
    found += [of_run(run, base) for run in runs]
    question = "nDCG@5 of each set's dev queries among the passages of all sets, and the change from the base model"
    sizes = {name: len(values) for name, values in base["queries"].items()}
    write_json(output, {"question": question, **machine(of_machine), "queries": sizes, "lines": found})


def sentence_transformers(output: Path, of_machine: Path, *sources: Path) -> None:
    lines = [line for source in sources for line in read(source)]
    for line in lines:
        del line["queries"]
        line["metrics"] = {name: round(value, 4) for name, value in line["metrics"].items()}
    question = "sentence-transformers' trainer on the same training files: on dev, seed 1 tunes, and the best setting of a loss has more"
    write_json(output, {"question": question, **machine(of_machine), "lines": lines})


if __name__ == "__main__":
    {"merged": merged, "sentence_transformers": sentence_transformers}[sys.argv[1]](*map(Path, sys.argv[2:]))
