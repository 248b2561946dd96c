import json
import re

import pytest

from clpl_moe.common.errors import UserError
from clpl_moe.train.__main__ import main
from clpl_moe.train.resume import check_same_data, newest_checkpoint
from helpers.tiny_training import arguments, refused, train_until, write_triplets


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


def test_newest_checkpoint(tmp_path):
    assert newest_checkpoint(tmp_path / "nowhere") is None
    for name, state in (("2", "{}"), ("10", "{}"), ("12", None), ("13", "{"), ("x", "{}")):
        folder = tmp_path / f"checkpoint-{name}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
