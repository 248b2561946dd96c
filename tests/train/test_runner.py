import importlib.util
import json
import re

import pytest
from safetensors import SafetensorError

from clpl_moe.common.errors import UserError
from clpl_moe.train.__main__ import main
from clpl_moe.train.arguments import CLPLDataArguments
from clpl_moe.train.checks import check_gathering
from clpl_moe.train.resume import check_same_data
from helpers.tiny_training import arguments, make_runner, refused, train_until, write_triplets


@pytest.fixture
def data(tmp_path):
    return write_triplets(tmp_path / "train.jsonl", 8)


@pytest.mark.slow
def test_resume_on_other_data_is_refused(tiny_encoder, data, tmp_path, capsys):
    argv = arguments(tiny_encoder, data, tmp_path / "run", save_strategy="steps", save_steps=1)
    train_until(argv, 3)
    before = {p: p.read_bytes() for p in (tmp_path / "run").glob("train_*")}
    assert len(before) == 2
    kept = data.read_bytes()
    write_triplets(data, 8, seed=1)
    err = refused([*argv, "--resume_from_checkpoint", "true"], capsys)
    assert f"error: {data}: not the data of the run to resume" in err
    assert "begin a new run" in err
    assert {p: p.read_bytes() for p in before} == before
    # The same contents at another place are the same data.
    data.unlink()
    moved = data.with_name("moved.jsonl")
    moved.write_bytes(kept)
    argv[argv.index(str(data))] = str(moved)
    main([*argv, "--resume_from_checkpoint", "true"])
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "run" / "train_data.json").read_text())["files"][0][0] == str(moved)


def test_number_of_processes(tmp_path, caplog):
    now = {"files": [["a", "0"], ["b", "1"]], "processes": 1, "batch_of_all": 8}
    checkpoint = tmp_path / "checkpoint-3"
    check_same_data(now, checkpoint)  # of a run that wrote no such file
    for before, message in (
        (
            now | {"processes": 2, "batch_of_all": 16},
            "1 processes, but the run to resume had 2, and 16 examples a step",
        ),
        (now | {"files": [["b", "1"], ["a", "0"]]}, "train_data: not the data of the run to resume"),
        (now | {"files": [["a", "0"]]}, "b: not the data of the run to resume"),
        ({}, "train_data.json: cannot be read"),
    ):
        (tmp_path / "train_data.json").write_text(json.dumps(before))
        with pytest.raises(UserError, match=re.escape(message)):
            check_same_data(now, checkpoint)
    assert not caplog.text
    (tmp_path / "train_data.json").write_text(json.dumps(now | {"processes": 2}))
    check_same_data(now, checkpoint)
    assert "1 processes, but the run to resume had 2: the batches are the same" in caplog.text


def test_on_a_cpu_freed_memory_is_kept(tiny_encoder, data, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("clpl_moe.train.runner.keep_freed_memory", lambda: calls.append(True))
    make_runner(arguments(tiny_encoder, data, tmp_path / "run", use_cpu=True))
    assert calls == [True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adam_beta1": 5}, "Invalid beta parameter at index 0: 5.0"),
        ({"adam_epsilon": -1}, "Invalid epsilon value: -1.0"),
        ({"optim_args": "odd"}, "optimizer adamw_torch"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type cosine_with_min_lr"),
        ({"lr_scheduler_kwargs": '{"odd": 1}'}, "odd"),
    ],
)
def test_options_that_only_the_optimizer_checks(tiny_encoder, data, tmp_path, capsys, options, message):
    for dry_run in (False, True):
        err = refused(arguments(tiny_encoder, data, tmp_path / "run", dry_run=dry_run, **options), capsys)
        assert message in err
        assert err.count("error: ") == 1
        assert not (tmp_path / "run").exists()


def test_push_to_hub_without_network(tiny_encoder, data, tmp_path, capsys):
    err = refused(arguments(tiny_encoder, data, tmp_path / "run", push_to_hub=True, hub_model_id="a/b"), capsys)
    assert "error: push_to_hub: the hub does not open the repository" in err
    assert "hf auth login" in err
    assert not list((tmp_path / "run").glob("train_*"))


def test_no_batches_no_training(tiny_encoder, data, tmp_path, capsys):
    """transformers saves the base model as trained."""
    argv = arguments(tiny_encoder, data, tmp_path / "run", per_device_train_batch_size=9, dataloader_drop_last=True)
    for more in ([], ["--dry_run", "true"]):
        assert "no file has the 9 examples of a batch" in refused([*argv, *more], capsys)
    assert not list((tmp_path / "run").iterdir())


def test_processes_gather_all_or_none(tmp_path):
    args = CLPLDataArguments(train_data=["t"])
    check_gathering([True, False], args, world_size=1)
    check_gathering([True, True], args, world_size=2)
    with pytest.raises(UserError, match="set same_dataset_within_batch"):
        check_gathering([True, False], args, world_size=2)
    args.same_dataset_within_batch = True
    check_gathering([True, False], args, world_size=2)


def test_a_run_that_would_wait_for_itself_is_refused(tiny_encoder, data, tmp_path, monkeypatch):
    own = write_triplets(tmp_path / "own_no_in_batch_neg.jsonl", 8, seed=1)
    runner = make_runner(arguments(tiny_encoder, [data, own], tmp_path / "run", negatives_cross_device=True))
    monkeypatch.setattr(type(runner.training_args), "world_size", 2)
    with pytest.raises(UserError, match="set same_dataset_within_batch"):
        runner.run()
    assert not list((tmp_path / "run").iterdir())


def test_a_package_that_only_the_trainer_misses(tiny_encoder, data, tmp_path, capsys):
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    err = refused(arguments(tiny_encoder, data, tmp_path / "run", report_to="wandb"), capsys)
    assert "pip install wandb" in err


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/0"),
    ],
)
def test_full_disk(tiny_encoder, data, tmp_path, capsys, monkeypatch, error):
    def save(*args, **kwargs):
        raise error

    # The model's weights at the end, and a checkpoint's optimizer.
    for place, strategy in (("Encoder.save", "no"), ("CLPLTrainer._save_optimizer_and_scheduler", "steps")):
        with monkeypatch.context() as patched:
            patched.setattr(f"clpl_moe.train.trainer.{place}", save)
            folder = tmp_path / strategy
            argv = arguments(tiny_encoder, data, folder, max_steps=1, save_strategy=strategy, save_steps=1)
            assert refused(argv, capsys).splitlines()[-1] == f"error: {folder}: No space left on device"
