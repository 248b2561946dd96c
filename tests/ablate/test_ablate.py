import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from clpl_moe import ablate as module
from clpl_moe.ablate import AblateArguments, CommandError, Workshop, make_plan, markdown, summarize, table_rows
from clpl_moe.ablate.__main__ import main
from clpl_moe.common.errors import UserError
from clpl_moe.common.files import write_json, write_jsonl

ROOT = Path(__file__).parents[2]


def make_collection(folder: Path, language: str = "ko") -> Path:
    """Passages of letters; queries are the beginnings of their passages."""
    texts = [f"{a}{b} {b}{a} {c}{a}{b}" for a in "abcd" for b in "efg" for c in "hi"]
    place = folder / language
    write_jsonl(place / "corpus.jsonl", ({"id": f"p{i}", "text": text} for i, text in enumerate(texts)))
    for split, numbers in (("train", range(0, 12)), ("dev", range(12, 24))):
        write_jsonl(place / f"{split}_queries.jsonl", ({"id": f"{split}{i}", "text": texts[i][:5]} for i in numbers))
        write_jsonl(
            place / f"{split}_qrels.jsonl", ({"qid": f"{split}{i}", "docid": f"p{i}", "relevance": 1} for i in numbers)
        )
    return folder


TRAIN = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "train_group_size": 2,
    "query_max_len": 20,
    "passage_max_len": 20,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "bf16": False,
}


@pytest.fixture
def configuration(tiny_encoder, tmp_path):
    """A comparison of the base model, a dense training and one with experts, on one language and two seeds."""
    lengths = {"query_max_len": 20, "passage_max_len": 20}
    return {
        "model": str(tiny_encoder),
        "languages": {"ko": {"collection": str(make_collection(tmp_path / "data"))}},
        "seeds": [1, 2],
        "mine": {"negatives": 3, "rank_to": 10, **lengths},
        "evaluate": {"top_k": 10, **lengths},
        "train": TRAIN,
        "rows": {
            "base": {"label": "Base model", "train": False},
            "dense": {"train": {"num_experts": 0, "trainable": "full"}},
            "experts": {"train": {"learning_rate": 1e-3}, "seeds": [1]},
        },
        "runs": str(tmp_path / "runs"),
        "output": str(tmp_path / "results" / "ablation.json"),
    }


def plan(configuration, **changes):
    return make_plan(AblateArguments(**(configuration | changes)))


def keys(configuration, **changes):
    return [run.decisive.key for run in plan(configuration, **changes).runs]


def test_rows_times_languages_times_seeds_and_negatives_once_per_kind(configuration, tmp_path):
    make_collection(tmp_path / "data", "fa")
    languages = {name: {"collection": str(tmp_path / "data")} for name in ("ko", "fa")}
    rows = configuration["rows"] | {"random": {"mine": {"sampling": "corpus"}}}
    found = plan(configuration, languages=languages, rows=rows)
    assert [str(run) for run in found.runs if run.collection.language == "fa"] == [
        "base fa",
        "dense fa seed 1",
        "dense fa seed 2",
        "experts fa seed 1",
        "random fa seed 1",
        "random fa seed 2",
    ]
    assert len(found.minings) == 4  # two kinds, two languages
    assert len({run.folder for run in found.runs}) == len(found.runs) == 12
    assert found.labels == {"base": "Base model", "dense": "dense", "experts": "experts", "random": "random"}


def test_a_run_is_known_by_what_decides_its_result(configuration, tmp_path):
    before = keys(configuration)
    # Neither names, places, order, nor defaults that are written out.
    renamed = {"a": {"train": False}, "b": {"train": {"trainable": "full", "num_experts": 0, "temperature": 0.02}}}
    assert keys(configuration, rows=renamed, output=str(tmp_path / "x.json"), parallel=2) == before[:3]
    # But options of every part, and the content of model and data.
    assert set(keys(configuration, train=TRAIN | {"temperature": 0.03})).isdisjoint(before[1:])
    assert set(keys(configuration, mine=configuration["mine"] | {"rank_from": 1})).isdisjoint(before[1:])
    assert set(keys(configuration, evaluate=configuration["evaluate"] | {"top_k": 9})).isdisjoint(before)
    with (tmp_path / "data" / "ko" / "dev_qrels.jsonl").open("a") as file:
        file.write('{"qid": "dev12", "docid": "p13", "relevance": 1}\n')
    assert set(keys(configuration)).isdisjoint(before)


@pytest.mark.parametrize(
    "option", ["train_data", "tokenizer_name", "dev_collection", "ance_collection", "ance_positive_queries"]
)
def test_a_run_is_known_by_what_its_paths_hold_and_not_by_their_names(configuration, tmp_path, option):
    folder = option in ("tokenizer_name", "dev_collection", "ance_collection")
    path = tmp_path / "ko-source"
    (path / "ko" if folder else tmp_path).mkdir(parents=True, exist_ok=True)
    file = path / "ko" / "file" if folder else path
    file.write_text("one")
    values = TRAIN | {
        "dev_collection": {"dev_language": "{language}"},
        "ance_collection": {"ance_refresh": "1", "ance_language": "{language}"},
        "ance_positive_queries": {"ance_refresh": "1", "ance_language": "ko", "ance_collection": "{collection}"},
    }.get(option, {})

    def of(name):
        value = ["{train_data}", name] if option == "train_data" else name
        (_, run, *_) = plan(configuration, train=values | {option: value}).runs
        return run.decisive

    before = of(str(path))
    moved = path.rename(tmp_path / "ko-moved")
    assert of(str(moved)).key == of(str(tmp_path / "{language}-moved")).key == before.key
    (moved / "ko" / "file" if folder else moved).write_text("two")
    assert of(str(moved)).key != before.key
    assert of("someone/theirs").values[f"train.{option}"] in ("someone/theirs", ["{train_data}", "someone/theirs"])


def test_placeholders_stand_as_they_are(configuration, tmp_path):
    values = {
        "train_data": ["{train_data}"],
        "ance_collection": "{collection}",
        "ance_positive_queries": "{collection}/{language}/positive_queries.jsonl",
    }
    train = TRAIN | values | {"ance_refresh": "1", "ance_language": "{language}"}
    (_, run, *_) = plan(configuration, train=train).runs
    assert {name: run.decisive.values[f"train.{name}"] for name in values} == values
    assert run.decisive.values["train.tokenizer_name"] is None


def test_options_of_a_language_and_of_a_row_go_before_the_shared_ones(configuration):
    languages = {"ko": configuration["languages"]["ko"] | {"train": {"max_steps": 5, "learning_rate": 1e-4}}}
    _, dense, _, experts = plan(configuration, languages=languages).runs
    assert (dense.train["max_steps"], dense.train["learning_rate"]) == (5, 1e-4)
    assert (experts.train["max_steps"], experts.train["learning_rate"]) == (5, 1e-3)
    assert dense.train["per_device_train_batch_size"] == 2


def test_a_row_that_was_renamed_keeps_its_run(configuration):
    run = plan(configuration).runs[1]
    finish(run, 0.5)
    rows = {"base": {"train": False}, "other": configuration["rows"]["dense"]}
    again = plan(configuration, rows=rows).runs[1]
    assert again.row == "other"
    assert again.folder == run.folder
    assert again.metric("nDCG@5") == 0.5


def test_an_option_that_is_new_makes_no_other_run_and_a_default_that_changed_does(configuration):
    run = plan(configuration).runs[1]
    finish(run, 0.5)
    path = run.folder / "options.json"
    options = json.loads(path.read_text(encoding="utf-8"))
    assert options["train.temperature"] == 0.02
    write_json(path, {k: v for k, v in options.items() if k != "train.temperature"})
    assert plan(configuration).runs[1].folder == run.folder
    assert plan(configuration, train=TRAIN | {"temperature": 0.1}).runs[1].folder != run.folder
    path = run.folder.rename(run.folder.parent / "earlier") / path.name
    assert plan(configuration).runs[1].folder.name == "earlier"
    write_json(path, options | {"train.temperature": 0.03})
    assert plan(configuration).runs[1].result() is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": {"a": {"train": {"penalty_wieght": 0}}}}, "rows: 'a', language 'ko': train: unknown option 'penalty_wieght'; did you mean 'penalty_weight'"),
        ({"rows": {"a": {"train": {"top_k": 3}}}}, "rows: 'a', language 'ko': train: top_k is 3 but there are 2 experts"),
        ({"rows": {"a": {"mine": {"rank_from": 0}}}}, "rows: 'a', language 'ko': mine: rank_from: found 0"),
        ({"rows": {"a": {"trane": {}}}}, "rows: 'a': unknown entry 'trane', expected some of label, mine, seeds, train"),
        ({"rows": {"a/b": {}}}, "rows: 'a/b': expected a name"),
        ({"rows": {"a": {"seeds": [-1]}}}, "seeds: found [-1]"),
        ({"rows": {"a": {"train": {"output_dir": "x"}}}}, "'output_dir' is set for each run by this command"),
        ({"train": TRAIN | {"token": "hf_x"}}, "'token' would stand in the results; export HF_TOKEN"),
        ({"rows": "x"}, "rows: found 'x', expected a mapping"),
        ({"languages": {"ko": {}}}, "languages: 'ko': expected either `collection`, a folder, or `squad`"),
        ({"languages": {"ko": {"squad": ["nothing.json"]}}}, "nothing.json: no such file"),
        ({"languages": {"ko": {"collection": "nowhere"}}}, "nowhere/ko/corpus.jsonl: no such file"),
        ({"languages": {"ko": {"collection": None}}}, "None/ko/corpus.jsonl: no such file"),
        ({"metric": "nonsense"}, "metric 'nonsense' is unknown"),
        ({"only": ["nobody"]}, "--only: found 'nobody', expected some of base, dense, experts"),
        ({"parallel": 0}, "--parallel: found 0"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_before_anything_is_written(configuration, changes, message, tmp_path):
    with pytest.raises(UserError) as error:
        plan(configuration, **changes)
    assert message in str(error.value)
    assert not (tmp_path / "runs").exists()


def finish(run, value):
    write_json(run.folder / "options.json", run.decisive.values)
    write_json(
        run.folder / "run.json",
        {
            "language": "ko",
            "seed": run.seed,
            "key": run.decisive.key,
            "training": None,
            "dtype": "float32",
            "metrics": {"nDCG@5": value},
            "machine": {"processor": "abacus"},
        },
    )


def test_table_has_mean_spread_and_error_relative_to_the_first_row(configuration, tmp_path):
    make_collection(tmp_path / "data", "fa")
    configuration["languages"] = {name: {"collection": str(tmp_path / "data")} for name in ("ko", "fa")}
    found = plan(configuration)
    values = {
        "base": {"ko": [0.8], "fa": [0.6]},
        "dense": {"ko": [0.84, 0.86], "fa": [0.7, 0.76]},
        "experts": {"ko": [0.9]},
    }
    for row, of_row in values.items():
        for language, of_language in of_row.items():
            runs = [run for run in found.runs if run.row == row and run.collection.language == language]
            for run, value in zip(runs, of_language, strict=True):
                finish(run, value)
    base, dense, experts = summarize(found, "nDCG@5")
    assert base["average"]["mean"] == pytest.approx(0.7)
    assert base["average"]["spread"] is None
    assert dense["languages"]["ko"]["mean"] == pytest.approx(0.85)
    assert dense["languages"]["ko"]["spread"] == pytest.approx(0.02 / 2**0.5)
    assert dense["average"]["values"] == pytest.approx([0.77, 0.81])  # seed by seed
    assert dense["languages"]["ko"]["error_change"] == pytest.approx(-0.25)  # 0.2 to 0.15
    assert dense["average"]["error_change"] == pytest.approx(0.21 / 0.3 - 1)
    assert dense["error_change_mean"] == pytest.approx((-0.25 + 0.27 / 0.4 - 1) / 2)
    assert experts["average"]["mean"] is None  # Persian is not there yet
    lines = markdown(table_rows([base, dense, experts])).splitlines()
    assert lines[0] == "| method | seeds | ko | fa | average | error | error by language |"
    assert lines[2] == "| Base model | 1 | 0.8000 | 0.6000 | 0.7000 |  |  |"
    assert lines[3] == "| dense | 2 | 0.8500 ± 0.0141 | 0.7300 ± 0.0424 | 0.7900 ± 0.0283 | −30.0% | −25.0%, −32.5% |"
    assert lines[4] == "| experts | 0–1 | 0.9000 | – | – | – | −50.0%, – |"


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
    output, config = Path(configuration["output"]), tmp_path / "c.yaml"
    assert run_main(configuration, config) == 0
    assert "4 of 4 runs are finished" in capsys.readouterr().out
    content = json.loads(output.read_text(encoding="utf-8"))
    assert [row["ko"] for row in content["rows"]] == ["0.5000", "0.6500 ± 0.0707", "0.8000"]
    assert [run["metrics"]["nDCG@5"] for run in content["measurements"]["runs"]] == [0.5, 0.6, 0.7, 0.8]
    machines = [run["machine"] for run in content["measurements"]["runs"]]
    assert machines == [{"processor": "abacus"}] * 4  # not where the table is written
    assert content["measurements"]["missing"] == []
    assert str(tmp_path) not in json.dumps({k: content[k] for k in ("command", "rows", "measurements", "machine")})
    assert "| dense | 2 | 0.6500 ± 0.0707 |" in output.with_suffix(".md").read_text(encoding="utf-8")
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert run_main(configuration, config) == 0  # its own results are replaced
    other = configuration | {"rows": {"base": {"train": False}}}
    assert run_main(other, config) == 2
    assert "file exists" in capsys.readouterr().err
    output.write_text("notes")
    assert run_main(configuration, config) == 2
    assert output.read_text() == "notes"
    assert run_main(other, config, "--overwrite", "true") == 0
    assert len(json.loads(output.read_text(encoding="utf-8"))["rows"]) == 1


def test_a_dry_run_says_what_is_missing_and_writes_nothing(configuration, tmp_path, capsys):
    finish(plan(configuration).runs[0], 0.5)
    assert run_main(configuration, tmp_path / "c.yaml", "--dry_run", "true") == 0
    out = capsys.readouterr().out
    assert "1 of 4 runs are finished" in out
    assert "to do: negatives ko-" in out
    assert "to do: dense ko seed 2" in out
    assert "to do: base" not in out
    assert "| Base model | 1 | 0.5000 |" in out
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["runs"]
    assert not Path(configuration["output"]).exists()
    write_json(Path(configuration["output"]), {"ablation": "of another configuration"})
    assert run_main(configuration, tmp_path / "c.yaml", "--dry_run", "true") == 0  # which is not in its way


def test_a_failed_job_is_reported_and_the_rest_goes_on():
    def work(job, slot):
        if job == "b":
            raise CommandError("out of luck")
        done.append(job)
        return "well"

    done = []
    assert Workshop(2).run_all(["a", "b", "c"], work, "jobs") == {"b": "out of luck"}
    assert sorted(done) == ["a", "c"]


def test_the_reason_of_a_failure_is_none_of_an_earlier_one(tmp_path, monkeypatch):
    (tmp_path / "log.txt").write_text("error: of an earlier time\n")
    monkeypatch.setattr(sys, "executable", "false")
    with (tmp_path / "lock").open("w") as lock, pytest.raises(CommandError, match="code 1: it said nothing"):
        Workshop(1).call("train", {}, tmp_path, 0, lock.fileno())


def test_cores_are_shared_between_runs(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    assert [Workshop(parallel).threads for parallel in (1, 2, 4, 9)] == [6, 3, 1, 1]


def test_two_processes_do_not_work_in_one_folder(tmp_path):
    other = module._locked(tmp_path / "run")
    with module._locked(tmp_path / "run"), pytest.raises(UserError, match="another process works in this folder"):
        other.__enter__()
    with module._locked(tmp_path / "run"):
        pass


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
        deadline = time.monotonic() + 400  # on a busy machine
        while not list(folder.glob("model/checkpoint-*/trainer_state.json")) and time.monotonic() < deadline:
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
    assert "2 of 3 runs are finished" in capsys.readouterr().out


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
