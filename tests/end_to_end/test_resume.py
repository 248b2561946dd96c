import json
import random
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from clpl_moe.train import resume
from clpl_moe.train.__main__ import main
from clpl_moe.train.trainer import CLPLTrainer
from end_to_end.kills import differences
from helpers.tiny_training import arguments, make_collection, read_metrics, refused, train_until, write_triplets

# FlagEmbedding's own resume ends in an AttributeError, and past that restores no weights (encoder keys without their
# prefix) and starts same-dataset batches from the beginning: every test here fails on it.

KILLED = """
import os, signal, sys
from clpl_moe.train.trainer import CLPLTrainer

stock, calls = CLPLTrainer.training_step, 0

def training_step(self, *args, **kwargs):
    global calls
    calls += 1
    if calls == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return stock(self, *args, **kwargs)

CLPLTrainer.training_step = training_step
from clpl_moe.train.__main__ import main
main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def model(tiny_encoder, tmp_path_factory):
    """The tiny encoder with dropout, so that the random state shows in the weights."""
    folder = tmp_path_factory.mktemp("models") / "dropout"
    shutil.copytree(tiny_encoder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    # 11 examples in batches of 2: the last batch of an epoch is short, and so is its last accumulated step.
    return [write_triplets(folder / "a.jsonl", 11), write_triplets(folder / "b.jsonl", 8, seed=1)]


@pytest.fixture(scope="module")
def whole(model, data, tmp_path_factory):
    """The folder of the uninterrupted run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    main(arguments(model, data, folder, **options(save_total_limit=10)))
    return folder


def options(**more):
    return {
        "max_steps": 10,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        "warmup_steps": 2,
    } | more


def assert_same_run(resumed, whole):
    expected = load_file(whole / "model.safetensors")
    found = load_file(resumed / "model.safetensors")
    assert found.keys() == expected.keys()
    different = [name for name in expected if not found[name].equal(expected[name])]
    assert not different
    assert any("router" in name for name in expected)
    keys = ("step", "loss", "contrastive", "learning_rate", "grad_norm", "expert_load")
    steps = [[{k: r[k] for k in keys} for r in read_metrics(f) if "loss" in r] for f in (resumed, whole)]
    assert [record["step"] for record in steps[0]] == list(range(1, 11))
    assert steps[0] == steps[1]


@pytest.mark.slow
def test_killed_and_resumed_in_a_new_process_is_the_uninterrupted_run(model, data, whole, tmp_path):
    # After the first checkpoint (6 forward passes or fewer, in an epoch of 11 + 8 examples) and before the end.
    call = random.randrange(8, 19)
    argv = arguments(model, data, tmp_path / "killed", **options())
    killed = subprocess.run([sys.executable, "-c", KILLED, str(call), *argv], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    before = [r["step"] for r in read_metrics(tmp_path / "killed")]
    assert before
    command = [sys.executable, "-m", "clpl_moe.train", *argv, "--resume_from_checkpoint", "true"]
    resumed = subprocess.run(command, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    print(f"killed in forward pass {call}, after step {before[-1]}")
    assert_same_run(tmp_path / "killed", whole)


@pytest.mark.parametrize(
    ("call", "more"),
    [
        pytest.param(12, {"same_dataset_within_batch": True, "small_threshold": 0, "drop_threshold": 0}, id="files"),
        # Both heads are trained, and restored; more negatives' queries than are used, so that drawing them shows.
        # Self-distillation begins in between; FlagEmbedding counts passes from 0 again.
        pytest.param(
            17,
            {
                "unified_finetuning": True,
                "queries_per_negative": 1,
                "use_self_distill": True,
                "self_distill_start_step": 5,
            },
            id="heads",
        ),
        pytest.param(15, {"gradient_checkpointing": True, "trainable": "full", "dataloader_num_workers": 1}, id="full"),
    ],
)
def test_resumed_run_is_the_uninterrupted_one(model, data, tmp_path, call, more):
    argv = arguments(model, data, tmp_path / "stopped", **options(**more))
    train_until(argv, call)
    main([*argv, "--resume_from_checkpoint", "true"])
    main(arguments(model, data, tmp_path / "whole", **options(**more)))
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_half_written_checkpoint_is_ignored(model, data, whole, tmp_path):
    argv = arguments(model, data, tmp_path / "stopped", **options())
    train_until(argv, 15)
    whole_one = tmp_path / "stopped" / "checkpoint-6"
    assert whole_one.is_dir()
    for number, state in ((8, None), (9, '{"global_step": 9, "log_')):
        folder = tmp_path / "stopped" / f"checkpoint-{number}"
        folder.mkdir()
        shutil.copy(whole_one / "model.safetensors", folder)
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    main([*argv, "--resume_from_checkpoint", "true"])
    assert_same_run(tmp_path / "stopped", whole)


def test_run_without_any_checkpoint_starts_again(model, data, whole, tmp_path):
    argv = arguments(model, data, tmp_path / "stopped", **options())
    train_until(argv, 4)
    assert [record["step"] for record in read_metrics(tmp_path / "stopped")] == [1]
    main([*argv, "--resume_from_checkpoint", "true"])
    assert_same_run(tmp_path / "stopped", whole)


def test_resume_from_a_named_checkpoint_of_another_folder(model, data, whole, tmp_path):
    checkpoint = whole / "checkpoint-3"
    argv = arguments(model, data, tmp_path / "other", **options())
    main([*argv, "--resume_from_checkpoint", str(checkpoint)])
    expected = load_file(whole / "model.safetensors")
    found = load_file(tmp_path / "other" / "model.safetensors")
    assert all(found[name].equal(expected[name]) for name in expected)


def test_a_checkpoint_does_not_go_into_another_run(model, data, whole, tmp_path, capsys):
    other = shutil.copytree(whole, tmp_path / "other")
    before = {path: path.stat().st_mtime_ns for path in other.rglob("*")}
    argv = arguments(model, data, other, **options())
    err = refused([*argv, "--resume_from_checkpoint", str(whole / "checkpoint-3")], capsys)
    assert f"{other}: the folder is not empty, and not the run that {whole / 'checkpoint-3'} belongs to" in err
    assert {path: path.stat().st_mtime_ns for path in other.rglob("*")} == before


def test_without_an_optimizers_state_nothing_is_resumed(model, data, whole, tmp_path, capsys):
    """transformers goes on with a new one."""
    argv = arguments(model, data, tmp_path / "new", **options())
    again = arguments(model, data, whole, **options())
    assert "a run, and no checkpoint" in refused([*again, "--resume_from_checkpoint", str(whole)], capsys)
    err = refused([*argv, "--resume_from_checkpoint", str(whole)], capsys)
    assert f"{whole}: holds no state of an optimizer (a run's folder" in err
    argv = arguments(model, data, tmp_path / "run", **options(save_only_model=True))
    train_until(argv, 9)
    err = refused([*argv, "--resume_from_checkpoint", "true"], capsys)
    assert "checkpoint-3: holds no state of an optimizer" in err


def test_a_run_that_is_over_stays_as_it_is(model, data, whole, tmp_path):
    """transformers trains one more step."""
    run = shutil.copytree(whole, tmp_path / "run")
    argv = arguments(model, data, run, **options(save_total_limit=10))
    (run / "model.safetensors").unlink()
    main([*argv, "--resume_from_checkpoint", "true"])
    assert_same_run(run, whole)
    assert not (run / "checkpoint-11").exists()
    assert json.loads((run / "trainer_state.json").read_text())["global_step"] == 10


@pytest.mark.parametrize("call", [None, 3, 4])
def test_early_stopping_is_that_of_the_uninterrupted_run(model, data, tmp_path, monkeypatch, call):
    """transformers begins to wait anew, and evaluates once more where ``eval_on_start`` is set."""
    more = {"gradient_accumulation_steps": 1, "max_steps": 20, "save_steps": 1, "early_stopping_patience": 3}
    more |= {"eval_on_start": True, "dev_collection": make_collection(tmp_path / "dev"), "dev_language": "ko"}
    argv = arguments(model, data, tmp_path / "run", **options(**more))
    scores = {0: 0.5, 1: 0.9, 2: 0.6}
    steps = []

    def evaluate(self, encoder):
        steps.append(self.state.global_step)
        value = scores.get(steps[-1], 0.3)
        return {"ndcg@5": value, "ndcg@10": value, "recall@100": value}

    stock = CLPLTrainer.evaluate

    def patched(self, *args, **kwargs):
        self.evaluator = lambda encoder: evaluate(self, encoder)
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(CLPLTrainer, "evaluate", patched)
    if call is None:
        main(argv)
    else:
        train_until(argv, call)
        main([*argv, "--resume_from_checkpoint", "true"])
    assert steps == [0, 1, 2, 3, 4]
    card = (tmp_path / "run" / "README.md").read_text()
    assert "| after training | 0.9000 |" in card
    (tmp_path / "run" / "README.md").unlink()
    main([*argv, "--resume_from_checkpoint", "true"])  # it is over
    assert steps == [0, 1, 2, 3, 4]
    assert (tmp_path / "run" / "README.md").read_text() == card
    assert [r["step"] for r in read_metrics(tmp_path / "run") if "eval_ndcg@10" in r] == steps


def test_nothing_to_resume(model, data, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    argv = arguments(model, data, tmp_path / "out")
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--resume_from_checkpoint", "true"])
    assert stop.value.code == 2
    assert "no run to resume" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--resume_from_checkpoint", str(tmp_path / "nowhere")])
    assert stop.value.code == 2
    assert "names no checkpoint of a run" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_options_of_a_run_cannot_change_unnoticed(model, data, tmp_path, capsys, caplog):
    folder = tmp_path / "run"
    train_until(arguments(model, data, folder, **options()), 9)
    before = (folder / "train_config.yaml").read_text()
    for more, message in (
        ({"num_experts": 3}, "num_experts is 3, but the run to resume has 2"),
        ({"trainable": "full"}, "trainable is full, but the run to resume has moe"),
        ({"optim": "sgd"}, "optim is sgd, but the run to resume has"),
        # They would come back from the checkpoint.
        ({"learning_rate": 1e-5}, "learning_rate is 1e-05, but the run to resume has 0.001"),
        ({"weight_decay": 0.5}, "weight_decay is 0.5, but the run to resume has 0.0"),
        # Some examples would come twice, others never.
        ({"seed": 7}, "seed is 7, but the run to resume has 42"),
        ({"data_seed": 7}, "data_seed is 7, but the run to resume has None"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last is True"),
        ({"max_example_num_per_dataset": 5}, "max_example_num_per_dataset is 5"),
        ({"per_device_train_batch_size": 4}, "and 4 examples a step where now there are 8"),
        ({"gradient_accumulation_steps": 1}, "and 4 examples a step where now there are 2"),
    ):
        err = refused(arguments(model, data, folder, **options(**more), resume_from_checkpoint=True), capsys)
        assert message in err
    assert (folder / "train_config.yaml").read_text() == before
    assert "resumed with other options" not in caplog.text
    main(arguments(model, data, folder, **options(max_steps=4, temperature=0.2), resume_from_checkpoint=True))
    assert "max_steps 10 -> 4, temperature 0.1 -> 0.2" in caplog.text


def test_a_batch_may_be_divided_in_another_way(tiny_encoder, data, tmp_path):
    """Without dropout and in-batch negatives nothing else depends on it: through two epochs, each with a short batch."""
    more = {"in_batch_negatives": False, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0}
    argv = arguments(tiny_encoder, data, tmp_path / "whole", **options(**more))
    main(argv)
    train_until(arguments(tiny_encoder, data, tmp_path / "divided", **options(**more)), 9)
    more |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "resume_from_checkpoint": True}
    main(arguments(tiny_encoder, data, tmp_path / "divided", **options(**more)))
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "divided"))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
    losses = [[r["loss"] for r in read_metrics(tmp_path / n) if "loss" in r] for n in ("whole", "divided")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_checkpoint_of_before_goes_on_in_its_own_order(model, data, tmp_path, monkeypatch, capsys):
    """Then batches were planned for single passes."""
    with monkeypatch.context() as patch:
        patch.setattr(resume, "batches_of_whole_steps", lambda args: False)
        main(arguments(model, data, tmp_path / "whole", **options()))
        train_until(arguments(model, data, tmp_path / "stopped", **options()), 15)
    for path in (tmp_path / "stopped").glob("checkpoint-*/trainer_state.json"):
        state = json.loads(path.read_text())
        assert state["stateful_callbacks"].pop("CLPLTrainer")["attributes"]["whole_steps"] is False
        path.write_text(json.dumps(state))
        (path.parent / "checksums.json").unlink()
    other = options(per_device_train_batch_size=4, gradient_accumulation_steps=1, resume_from_checkpoint=True)
    err = refused(arguments(model, data, tmp_path / "stopped", **other), capsys)
    assert "per_device_train_batch_size is 4, but the run to resume has 2" in err
    main(arguments(model, data, tmp_path / "stopped", **options(), resume_from_checkpoint=True))
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.parametrize("end", ["middle", "last checkpoint", "card"])
def test_every_file_is_that_of_the_uninterrupted_run(model, data, tmp_path, end, monkeypatch):
    """With logs between checkpoints, and stopped before the last ones, after the last checkpoint, or still later."""
    folder = tmp_path / "output"  # which some files name
    argv = arguments(model, data, folder, **options(max_steps=9, logging_steps=2))
    main(argv)
    folder.rename(tmp_path / "whole")
    if end == "middle":
        train_until(argv, 9)
    else:
        with monkeypatch.context() as patch:
            name = "_finalize_training" if end == "last checkpoint" else "save_state"
            patch.setattr(CLPLTrainer, name, interrupt)
            with pytest.raises(SystemExit):
                main(argv)
    main([*argv, "--resume_from_checkpoint", "true"])
    assert differences(folder, tmp_path / "whole") == []
    assert "train_loss" in read_metrics(folder)[-1]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    main([*argv, "--resume_from_checkpoint", "true"])
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def interrupt(*args):
    raise KeyboardInterrupt
