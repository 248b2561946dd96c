import json
import os
import re
import shutil

import pytest
import torch

from clpl_moe.common.errors import UserError
from clpl_moe.train.__main__ import main
from clpl_moe.train.checkpoint import fault
from clpl_moe.train.resume import check_same_data, newest_checkpoint
from helpers.tiny_training import arguments, read_metrics, refused, train_until, write_triplets


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
        (
            now | {"batch_of_all": 6},
            "another batch than that of the run to resume, and 6 examples a step where now there are 8",
        ),
        (now | {"files": [["b", "1"], ["a", "0"]]}, "train_data: not the data of the run to resume"),
        (now | {"files": [["a", "0"]]}, "b: not the data of the run to resume"),
        ({}, "train_data.json: cannot be read"),
        (now | {"files": [1]}, "train_data.json: cannot be read"),
        (now | {"processes": None}, "train_data.json: cannot be read"),
        ([1], "train_data.json: cannot be read"),
    ):
        (tmp_path / "train_data.json").write_text(json.dumps(before))
        with pytest.raises(UserError, match=re.escape(message)):
            check_same_data(now, checkpoint)
    assert not caplog.text
    (tmp_path / "train_data.json").write_text(json.dumps(now | {"processes": 2}))
    check_same_data(now, checkpoint)
    assert "1 processes, but the run to resume had 2: the batches are the same" in caplog.text
    with pytest.raises(UserError, match="its version planned batches for single passes: start as many processes"):
        check_same_data(now, checkpoint, whole_steps=False)


@pytest.fixture(scope="module")
def stopped(tiny_encoder, tmp_path_factory):
    """A run with checkpoints 1, 2 and 3 of 4, of a model with heads that are trained."""
    folder = tmp_path_factory.mktemp("stopped")
    data = write_triplets(folder / "train.jsonl", 8)
    argv = arguments(
        tiny_encoder,
        data,
        folder / "run",
        save_strategy="steps",
        save_steps=1,
        save_total_limit=0,
        unified_finetuning=True,
    )
    train_until(argv, 4)
    return argv, folder / "run"


@pytest.fixture
def run(stopped, tmp_path):
    """A copy of that run, and the command that resumes it."""
    argv, folder = stopped
    shutil.copytree(folder, tmp_path / "run")
    argv = [str(tmp_path / "run") if word == str(folder) else word for word in argv]
    return tmp_path / "run", [*argv, "--resume_from_checkpoint", "true"]


STATES = (
    "[1]",
    "null",
    "{}",
    '"x"',
    '{"global_step": "3", "log_history": []}',
    "\xff",
    "[" * 100_000,
    '{"global_step": 1e9}',
)
FILES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", "colbert_linear.pt")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def fifo(path):
    path.unlink()
    os.mkfifo(path)


DAMAGES = {
    **{
        f"state {i}": (lambda c, s=s: (c / "trainer_state.json").write_bytes(s.encode("latin-1")))
        for i, s in enumerate(STATES)
    },
    **{f"{name} cut": (lambda c, name=name: cut(c / name)) for name in FILES},
    **{f"{name} empty": (lambda c, name=name: (c / name).write_bytes(b"")) for name in FILES},
    **{f"{name} foreign": (lambda c, name=name: torch.save([1], c / name)) for name in FILES},
    **{f"{name} of nothing": (lambda c, name=name: torch.save({}, c / name)) for name in FILES[:3]},
    **{f"no {name}": (lambda c, name=name: (c / name).unlink()) for name in FILES[:4]},
    **{f"{name} a fifo": (lambda c, name=name: fifo(c / name)) for name in (*FILES, "trainer_state.json")},
    "another step": lambda c: shutil.copy(c.parent / "checkpoint-2" / "trainer_state.json", c),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_of_damaged_checkpoints_the_newest_whole_one_is_taken(run, damage, caplog):
    folder, _ = run
    assert newest_checkpoint(folder) == folder / "checkpoint-3"
    DAMAGES[damage](folder / "checkpoint-3")
    assert newest_checkpoint(folder) == folder / "checkpoint-2"
    assert f"{folder / 'checkpoint-3'}" in caplog.text
    assert "this checkpoint is left out" in caplog.text


def test_a_run_of_damaged_checkpoints_only_is_refused(run, capsys):
    folder, argv = run
    for number in (1, 2, 3):
        cut(folder / f"checkpoint-{number}" / "optimizer.pt")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    err = refused(argv, capsys)
    assert "checkpoint-3/optimizer.pt: damaged" in err
    assert "no checkpoint of the run is whole" in err
    err = refused([*argv[:-1], str(folder / "checkpoint-2")], capsys)
    assert "checkpoint-2/optimizer.pt: damaged" in err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\n", b"[1]\nnull\n", b'{"step": "3"}\n{"step": null}\n', b'{"step": 1, "a": "\xff"}\n']
)
def test_faulty_lines_of_the_course_are_dropped(run, content):
    folder, argv = run
    whole = (folder / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(content + whole)
    main(argv)
    assert [record["step"] for record in read_metrics(folder)] == [1, 2, 3, 4, 4]


def test_a_damaged_checkpoint_gives_way_to_the_run(run):
    """Its step is trained again: nothing of it is left, and nothing in it is waited for."""
    folder, argv = run
    fifo(folder / "checkpoint-3" / "optimizer.pt")
    (folder / "checkpoint-3" / ".half-written").write_text("x")
    main(argv)
    assert fault(folder / "checkpoint-3") is None
    assert not (folder / "checkpoint-3" / ".half-written").exists()


@pytest.mark.parametrize("name", ["train_config.yaml", "train_data.json", "metrics.jsonl"])
def test_what_is_no_file_is_not_waited_for(run, capsys, name):
    folder, argv = run
    fifo(folder / name)
    assert f"{name}: not a file" in refused(argv, capsys)


def test_an_optimizer_of_another_model_is_refused(run, capsys):
    folder, argv = run
    path = folder / "checkpoint-3" / "optimizer.pt"
    state = torch.load(path, weights_only=True)
    for values in state["state"].values():
        values["exp_avg"] = torch.zeros(7)
    torch.save(state, path)
    assert "optimizer.pt: does not fit this model" in refused(argv, capsys)
    state["param_groups"] = state["param_groups"][:1]
    state["state"] = {k: v for k, v in state["state"].items() if k in state["param_groups"][0]["params"]}
    torch.save(state, path)
    assert "optimizer.pt: does not fit this model" in refused(argv, capsys)


def test_newest_checkpoint(run, caplog):
    folder, _ = run
    assert newest_checkpoint(folder.parent / "nowhere") is None
    for name, state in (("12", None), ("13", "{"), ("x", "{}"), ("²", "{}"), ("4-old", "{}")):
        (folder / f"checkpoint-{name}").mkdir()
        if state is not None:
            (folder / f"checkpoint-{name}" / "trainer_state.json").write_text(state)
    shutil.copytree(folder / "checkpoint-3", folder / "checkpoint-10")
    state = json.loads((folder / "checkpoint-10" / "trainer_state.json").read_text())
    (folder / "checkpoint-10" / "trainer_state.json").write_text(json.dumps(state | {"global_step": 10}))
    assert newest_checkpoint(folder) == folder / "checkpoint-10"
    for number in (1, 2, 3, 10):
        shutil.rmtree(folder / f"checkpoint-{number}")
    assert newest_checkpoint(folder) is None  # a killed run left these
