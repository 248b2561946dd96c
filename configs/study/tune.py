"""Configs of `ablate` for a sweep and for what follows it: see configs/study/fair.yaml.

python configs/study/tune.py sweep CONFIG RUNS      writes RUNS/NAME-sweep.yaml
python configs/study/tune.py final CONFIG RUNS      reads the sweep's finished runs, writes RUNS/NAME-final.yaml
python configs/study/tune.py test CONFIG RUNS       the same on the split set aside
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import yaml

Setting = dict[str, Any]


def settings(row: dict[str, Any]) -> list[Setting]:
    """All combinations of the values that a row is to be tried with."""
    tune = row.get("tune", {})
    return [dict(zip(tune, values)) for values in itertools.product(*tune.values())]


def name_of(row: str, setting: Setting) -> str:
    return "@".join([row, *(f"{value:g}" for value in setting.values())])


def with_setting(row: dict[str, Any], setting: Setting, shared: Setting) -> dict[str, Any]:
    """A row of `ablate` with the options of a setting; `shared` are those of all rows."""
    found = {key: value for key, value in row.items() if key not in ("tune", "as")}
    if found.get("train") is not False:
        train = found.get("train", {}) | setting
        found["train"] = {key: fill(value, shared | train) for key, value in train.items()}
    return found


def fill(value: Any, train: Setting) -> Any:
    """The value of another option in place of its name in braces."""
    names = {f"{{{name}}}": other for name, other in train.items()}
    return names[value] if isinstance(value, str) and value in names else value


def sweep(config: dict[str, Any]) -> dict[str, Any]:
    """Every setting of every row that has some, in turns: the first of each row, the second of each row, and so on."""
    tuned = {name: settings(row) for name, row in config["rows"].items() if row.get("tune")}
    turns = itertools.chain.from_iterable(
        itertools.zip_longest(*([(n, s) for s in found] for n, found in tuned.items()))
    )
    rows = {"base": config["rows"]["base"]}
    rows |= {name_of(n, s): with_setting(config["rows"][n], s, config["train"]) for n, s in filter(None, turns)}
    for row in rows.values():
        row.pop("label", None)
    return config | {"rows": rows, "seeds": config["sweep_seeds"]}


def best(config: dict[str, Any], runs: Path) -> dict[str, Setting]:
    """Of each tuned row the setting with the highest mean over languages and seeds; settings that lack one are left out."""
    found: dict[str, dict[tuple[str, int], float]] = {}
    expected = len(config["languages"]) * len(config["sweep_seeds"])
    for path in (runs / "runs").glob("*/run.json"):
        run = json.loads(path.read_text(encoding="utf-8"))
        if run["seed"] in config["sweep_seeds"]:
            found.setdefault(run["row"], {})[run["language"], run["seed"]] = run["metrics"][config["metric"]]
    chosen = {}
    for name, row in config["rows"].items():
        means = {
            index: statistics.fmean(values.values())
            for index, setting in enumerate(settings(row))
            if len(values := found.get(name_of(name, setting), {})) == expected
        }
        if means:
            chosen[name] = settings(row)[max(means, key=lambda index: means[index])]
    return chosen


def final(config: dict[str, Any], chosen: dict[str, Setting]) -> dict[str, Any]:
    """Each row at its best setting; rows whose sweep is missing keep their own options."""
    rows = {
        n: with_setting(row, chosen.get(row.get("as", n), {}), config["train"]) for n, row in config["rows"].items()
    }
    return config | {"rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=["sweep", "final", "test"])
    parser.add_argument("config", type=Path)
    parser.add_argument("runs", type=Path)
    arguments = parser.parse_args()
    config, runs = yaml.safe_load(arguments.config.read_text(encoding="utf-8")), arguments.runs
    of = config.pop("settings_of", None)  # the config whose sweep decides
    tuned = config if of is None else yaml.safe_load(Path(of).read_text(encoding="utf-8"))
    if arguments.part == "sweep":
        made = sweep(config)
    else:
        chosen = best(tuned, runs)
        print(json.dumps(chosen, indent=1))
        made = final(config, chosen)
    if arguments.part == "test":
        made["evaluate"] = made["evaluate"] | {"split": "test"}
    made.pop("sweep_seeds", None)
    path = runs / f"{arguments.config.stem}-{arguments.part}"
    made |= {"runs": str(runs), "output": f"{path}.json"}
    path.with_suffix(".yaml").write_text(yaml.safe_dump(made, sort_keys=False, allow_unicode=True), encoding="utf-8")


if __name__ == "__main__":
    main()
