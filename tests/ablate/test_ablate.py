import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from clpl_moe.ablate import ablate
from clpl_moe.ablate.__main__ import main
from clpl_moe.common.errors import UserError
from clpl_moe.common.files import write_json
from helpers.ablation import TRAIN, finish, make_collection, plan

ROOT = Path(__file__).parents[2]


def run_main(configuration, path, *argv):
    """Run the command on the configuration as a file; returns the exit code."""
    path.write_text(yaml.safe_dump(configuration, sort_keys=False), encoding="utf-8")
    try:
        main(["--config", str(path), *argv])
    except SystemExit as stop:
        return stop.code
    return 0


def test_finished_runs_become_json_table_and_picture_and_nothing_else_is_replaced(configuration, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for number, run in enumerate(plan(configuration).runs):
        finish(run, 0.5 + number / 10)
    chosen = {"alpha": 0.5, "metric": "nDCG@10", "candidates": [{"alpha": 0.5, "metrics": {"nDCG@10": 0.9}}]}
    write_json(run.folder / "model" / "merge.json", {"base": str(tmp_path), **chosen})  # of the last run
    output, config = Path(configuration["output"]), tmp_path / "c.yaml"
    assert run_main(configuration, config) == 0
    assert "4 of 4 runs are finished" in capsys.readouterr().err
    content = json.loads(output.read_text(encoding="utf-8"))
    assert [row["ko"] for row in content["rows"]] == ["0.5000", "0.6500 ± 0.0707", "0.8000"]
    assert [run["metrics"]["nDCG@5"] for run in content["measurements"]["runs"]] == [0.5, 0.6, 0.7, 0.8]
    machines = [run["machine"] for run in content["measurements"]["runs"]]
    assert machines == [{"processor": "abacus"}] * 4  # not where the table is written
    assert [run["mixture"] for run in content["measurements"]["runs"]] == [None, None, None, chosen]
    assert content["measurements"]["missing"] == []
    assert str(tmp_path) not in json.dumps({k: content[k] for k in ("command", "rows", "measurements", "machine")})
    assert "| dense | 2 | 0.6500 ± 0.0707 |" in output.with_suffix(".md").read_text(encoding="utf-8")
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert run_main(configuration, config) == 0  # its own results are replaced
    more = configuration | {
        "seeds": [*configuration["seeds"], 3],
        "rows": {**configuration["rows"], "more": {"train": False}},
    }
    assert run_main(more, config, "--only", "base", "more") == 0  # and so they are by a comparison that has all of them
    content = json.loads(output.read_text(encoding="utf-8"))
    assert [run["metrics"]["nDCG@5"] for run in content["measurements"]["runs"]] == [0.5, 0.6, 0.7, 0.8, 0.5]
    assert content["measurements"]["missing"] == ["dense ko seed 3"]
    fewer = configuration | {"rows": {"base": {"train": False}}}
    for other in (fewer, configuration | {"metric": "nDCG@10"}):
        assert run_main(other, config) == 2
        assert "file exists" in capsys.readouterr().err
    output.write_text("notes")
    assert run_main(configuration, config) == 2
    assert output.read_text() == "notes"
    assert run_main(fewer, config, "--overwrite", "true") == 0
    assert len(json.loads(output.read_text(encoding="utf-8"))["rows"]) == 1


def test_a_dry_run_says_what_is_missing_and_writes_nothing(configuration, tmp_path, capsys):
    finish(plan(configuration).runs[0], 0.5)
    assert run_main(configuration, tmp_path / "c.yaml", "--dry_run", "true") == 0
    out, err = capsys.readouterr()
    assert "1 of 4 runs are finished" in err
    assert "to do: negatives ko-" in out
    assert "to do: dense ko seed 2" in out
    assert "to do: base" not in out
    assert "| Base model | 1 | 0.5000 |" in out
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["runs"]
    assert not Path(configuration["output"]).exists()
    write_json(Path(configuration["output"]), {"ablation": "of another configuration"})
    assert run_main(configuration, tmp_path / "c.yaml", "--dry_run", "true") == 0  # which is not in its way


def test_a_metric_that_looks_deeper_than_the_runs_is_warned_of(configuration, tmp_path, capsys):
    for metric, warned in (("nDCG@10", False), ("R@100", True)):
        assert run_main(configuration | {"metric": metric}, tmp_path / "c.yaml", "--dry_run", "true") == 0
        err = capsys.readouterr().err
        assert (f"warning: {metric}: only 10 passages are retrieved for each query (top_k)" in err) == warned


@pytest.mark.slow
def test_a_comparison_from_squad_to_table_through_a_kill(configuration, tmp_path, capsys):
    """Prepared, mined, trained, evaluated; killed after a checkpoint; a row fails; started again."""
    articles = [
        {
            "title": f"t{a}",
            "paragraphs": [
                {"context": f"{a}{b}x {b}{a}y {a}z", "qas": [{"id": f"{a}{b}", "question": f"{a}{b}x?", "answers": [{"text": a}]}]}
                for b in "efgh"
            ],
        }
        for a in "abcdef"
    ]  # fmt: skip
    write_json(tmp_path / "squad.json", {"data": articles})
    broken = tmp_path / "broken"
    broken.mkdir()
    configuration |= {
        "languages": {"ko": {"squad": [str(tmp_path / "squad.json")]}},
        "seeds": [1],
        "mine": configuration["mine"] | {"max_positive_ratio": 0, "max_overlap": 1},
        "train": TRAIN
        | {"max_steps": 120, "save_strategy": "steps", "save_steps": 20, "save_total_limit": 1, "bf16": False},
        "evaluate": configuration["evaluate"] | {"dtype": "bfloat16"},
    }
    configuration["rows"] = {
        "base": {"train": False},
        "experts": {"train": {"learning_rate": 1e-3}},
        "broken": {"train": {"model_name_or_path": str(broken)}},
    }
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(configuration, sort_keys=False), encoding="utf-8")
    argv = [sys.executable, "-m", "clpl_moe.ablate", "--config", str(config)]
    folder = plan(configuration).runs[1].folder
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    try:
        deadline = time.monotonic() + 900  # on a busy machine
        # The first checkpoint is whole when there is a second one.
        while {path.name for path in folder.glob("model/checkpoint-*")} <= {"checkpoint-20"}:
            assert time.monotonic() < deadline
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert not (folder / "run.json").exists()
    metrics = folder / "model" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("{", '{"before": true, ', 1))
    again = subprocess.run(argv, capture_output=True, text=True)
    assert again.returncode == 1
    assert "FAILED broken ko seed 1: train ended with code 2: error: " in again.stderr
    assert "Traceback" not in again.stderr
    result = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert result["training"]["steps"] == 120
    assert result["training"]["precision"] == "float32"
    assert result["dtype"] == "bfloat16"
    steps = [json.loads(line)["step"] for line in (folder / "model" / "metrics.jsonl").read_text().splitlines()]
    assert steps[:120] == list(range(1, 121))  # none lost, none twice
    assert metrics.read_text().startswith('{"before": true')  # it went on from a checkpoint
    assert not list((folder / "model").glob("*.safetensors"))
    assert (folder / "results" / "ko" / "run.trec").is_file()
    content = json.loads(Path(configuration["output"]).read_text(encoding="utf-8"))
    assert content["measurements"]["missing"] == ["broken ko seed 1"]
    assert [row["method"] for row in content["rows"]] == ["base", "experts", "broken"]
    assert [row["seeds"] for row in content["rows"]] == ["1", "1", "0"]
    assert content["settings"]["precision"] == "bfloat16 and float32"
    assert run_main(configuration, config, "--dry_run", "true") == 0
    assert "2 of 3 runs are finished" in capsys.readouterr().err


def test_the_configs_of_the_repository_are_valid(monkeypatch, tmp_path):
    """Every row parses, and the rows differ in what they are named after."""
    values = yaml.safe_load((ROOT / "configs" / "ablation.yaml").read_text(encoding="utf-8"))
    shared = {
        "languages": {"ko": {"collection": str(make_collection(tmp_path / "data"))}},
        "runs": str(tmp_path / "runs"),
    }
    rows = {run.row: run for run in plan(values | shared, seeds=[1]).runs}
    paper = ["base", "random", "ance", "clp", "clp_ffn", "moe_2024"]
    assert list(rows) == [*paper, "ours", "ours_no_penalty", "ours_moe", "ours_100", "ours_epoch"]
    assert len({run.decisive.key for run in rows.values()}) == len(rows)
    assert rows["base"].train is None
    assert rows["random"].mined.options["sampling"] == "corpus"
    assert rows["ance"].mined is rows["clp"].mined is rows["moe_2024"].mined
    budgets = {
        name: (r.train["max_steps"], r.train["per_device_train_batch_size"]) for name, r in rows.items() if r.train
    }
    assert budgets.pop("ours_100") == (100, 8)
    assert budgets.pop("ours_epoch") == (-1, 8)
    epoch = rows["ours_epoch"].train
    assert (epoch["num_train_epochs"], epoch["max_example_num_per_dataset"]) == (1, 1600)
    assert set(budgets.values()) == {(20, 8)}
    ance = yaml.safe_load((ROOT / "configs" / "ance.yaml").read_text(encoding="utf-8"))
    again = {run.row: run for run in plan(ance | shared, seeds=[1]).runs}
    assert again["once"].decisive.key == rows["ours"].decisive.key != again["refreshed"].decisive.key
    lora = yaml.safe_load((ROOT / "configs" / "lora.yaml").read_text(encoding="utf-8"))
    rows = {run.row: run.train for run in plan(lora | shared, seeds=[1]).runs if run.train}
    of_layers = {"trainable", "frozen_layers", "num_experts", "moe_layers", "moe_target"}
    full, adapters = ({n: v for n, v in rows[row].items() if n in of_layers} for row in ("full", "lora_16"))
    assert full | {"trainable": "lora"} == adapters  # of the same layers
    assert {train["trainable"] for train in rows.values()} == {"full", "moe", "lora"}


@pytest.mark.parametrize("language", ["ko", "fa", "hi"])
def test_the_published_recipe_passes_a_dry_run(language, monkeypatch, capsys):
    from clpl_moe.train.__main__ import main as train

    monkeypatch.chdir(ROOT)
    config = f"configs/paper/{language}.yaml"
    train(["--config", config, "--train_data", f"data/samples/{language}/train.jsonl", "--dry_run", "true"])
    out = capsys.readouterr().out
    assert "1 per device × 1 device(s) × 4 accumulated, 5 passages a query" in out
    assert "temperature 0.02, penalty weight 0.1 (cosine), in-batch negatives off" in out
    assert "topk_softmax" in out


def test_called_from_python(configuration, capsys):
    runs = plan(configuration).runs
    finish(runs[0], 0.5)
    dry = ablate(**configuration, dry_run=True)
    assert dry.rows[0]["languages"]["ko"] | {"error_change": 0} == {
        "mean": 0.5,
        "spread": None,
        "values": [0.5],
        "error_change": 0,
    }
    assert dry.to_do["dense ko seed 2"] == runs[2].folder
    assert len(dry.to_do) == 4  # three runs and their negatives
    assert not dry.output.exists()
    for number, run in enumerate(runs[1:], 6):
        finish(run, number / 10)
    found = ablate(**configuration)
    assert [row["average"]["mean"] for row in found.rows] == pytest.approx([0.5, 0.65, 0.8])
    assert (found.to_do, found.failed) == ({}, {})
    assert json.loads(found.output.read_text(encoding="utf-8"))["measurements"]["summary"] == found.rows
    assert "| dense | 2 | 0.6500 ± 0.0707 |" in str(found)
    assert capsys.readouterr().out == ""
    for options, message in (
        ({"row": {}}, r"ablate\(\): unknown argument 'row'; did you mean 'rows'"),
        ({"only": ["nobody"]}, "only: found 'nobody', expected some of base, dense, experts"),
        ({"rows": {"a": {"train": {"top_k": 3}}}}, "top_k is 3 but there are 2 experts"),
    ):
        with pytest.raises(UserError, match=message):
            ablate(**configuration | options)


def test_without_forks_it_says_so_at_once(configuration, tmp_path, capsys, monkeypatch):
    monkeypatch.delattr(os, "fork")
    assert run_main(configuration, tmp_path / "c.yaml") == 2
    assert "use Linux, macOS, or WSL on Windows" in capsys.readouterr().err
    assert not Path(configuration["output"]).parent.exists()
