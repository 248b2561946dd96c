"""The scripts of configs/study."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "configs" / "study"))
import tune


def test_the_best_setting_is_that_of_all_seeds(tmp_path):
    config = {"languages": ["ko", "fa"], "sweep_seeds": [1, 2], "metric": "nDCG@5"}
    config["rows"] = {"base": {"train": False}, "a": {"tune": {"learning_rate": [1e-5, 2e-5, 3e-5]}}}
    # By setting, seed and language; the last one lacks a run, the seed 11 is none of the sweep.
    values = {
        "a@1e-05": {(1, "ko"): 0.6, (1, "fa"): 0.6, (2, "ko"): 0.6, (2, "fa"): 0.6},
        "a@2e-05": {(1, "ko"): 0.1, (1, "fa"): 0.1, (2, "ko"): 0.8, (2, "fa"): 0.8, (11, "ko"): 1.0},
        "a@3e-05": {(1, "ko"): 0.9, (1, "fa"): 0.9, (2, "ko"): 0.9},
    }
    for row, runs in values.items():
        for (seed, language), value in runs.items():
            folder = tmp_path / "runs" / f"{row}-{seed}-{language}"
            folder.mkdir(parents=True)
            run = {"row": row, "seed": seed, "language": language, "metrics": {"nDCG@5": value}}
            (folder / "run.json").write_text(json.dumps(run))
    assert tune.best(config, tmp_path) == {"a": {"learning_rate": 1e-5}}
