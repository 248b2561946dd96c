"""The scripts of configs/study."""

import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "configs" / "study"))
import compare
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


def test_values_of_queries_stay_when_their_runs_are_gone(tmp_path, monkeypatch):
    def add(row, seed, values):
        folder = tmp_path / "runs" / "runs" / f"{row}-{seed}"
        (folder / "results").mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"row": row, "seed": seed, "language": "ko"}))
        lines = ["query_id,nDCG@5 (model)", *(f"q{n},{value}" for n, value in enumerate(values))]
        (folder / "results" / "per_query.csv").write_text("\n".join(lines))

    def differences(*seeds):
        argv = ["compare.py", tmp_path / "runs", tmp_path / "out.json", "a-base", "a-sentence_transformers", "not-yet"]
        argv += ["--sentence_transformers", tmp_path / "st.jsonl", "--seeds", *seeds]
        argv += ["--collection", tmp_path, "--languages", "ko", "--values", tmp_path / "values.json"]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        compare.main()
        row, other, without_runs = json.loads((tmp_path / "out.json").read_text())["rows"]
        assert without_runs["seeds"] == 0
        assert other["languages"]["ko"]["difference"] == pytest.approx(0.25)
        return row["languages"]["ko"]["by_seed"], row["languages"]["ko"]["interval"]

    monkeypatch.setattr(compare, "passages", lambda *_: {"q0": "p0", "q1": "p1", "q2": "p2"})
    monkeypatch.setattr(compare, "similarities", lambda *_: {})
    st = {"language": "ko", "seed": 11, "split": "dev", "queries": {"q0": 0.5, "q1": 0.25, "q2": 0.25}}
    (tmp_path / "st.jsonl").write_text(json.dumps(st) + "\n" + json.dumps(st | {"split": "test", "queries": {}}))
    add("base", None, [0.5, 0.25, 1])
    add("a", 11, [0.6, 0.35, 0.8])
    first = differences(11)
    assert first[0] == [0.0]
    shutil.rmtree(tmp_path / "runs")
    assert differences(11) == first
    add("a", 12, [0.8, 0.55, 1])
    assert differences(11, 12)[0] == [0.0, 0.2]
