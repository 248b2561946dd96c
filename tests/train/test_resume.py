import json
import os
import re
import shutil
import signal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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


@pytest.mark.parametrize("name", ["train_config.yaml", "train_data.json", "metrics.jsonl", "trainer_state.json"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_not_waited_for(run, capsys, name, make):
    folder, argv = run
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    assert f"{name}: not a file" in refused(argv, capsys)


def test_a_file_named_as_a_checkpoint_is_left(run, capsys):
    folder, argv = run
    (folder / "checkpoint-4").write_text("mine")
    assert "checkpoint-4: not a folder, and in the way" in refused(argv, capsys)
    assert (folder / "checkpoint-4").read_text() == "mine"


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


@pytest.mark.parametrize("state", [None, {}, {"weight": torch.zeros(1), "bias": torch.zeros(32)}])
def test_heads_that_do_not_fit_are_refused(run, capsys, state):
    folder, argv = run
    path = folder / "checkpoint-3" / "colbert_linear.pt"
    path.unlink() if state is None else torch.save(state, path)
    before = contents(folder)
    assert "colbert_linear.pt: does not fit this model" in refused(argv, capsys)
    assert contents(folder) == before


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


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
OF_A_CHECKPOINT = (*FILES, "trainer_state.json", "config.json", "tokenizer.json", "modules.json", "training_args.bin")
OF_A_RUN = ("train_config.yaml", "train_data.json", "metrics.jsonl", "trainer_state.json")
PLACES = st.sampled_from([f"checkpoint-3/{name}" for name in OF_A_CHECKPOINT] + list(OF_A_RUN)) | st.sampled_from(
    ["checkpoint-2/optimizer.pt", "checkpoint-²/trainer_state.json", "checkpoint-03/trainer_state.json", "checkpoint-3"]
)


def put(path, content):
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)  # a pipe would wait for a reader
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)


def change_json(path, draw):
    """Another value in place of one within a file of JSON."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return put(path, json.dumps(draw(JSON)).encode())
    at = values
    while isinstance(at, (dict, list)) and at:
        key = draw(st.sampled_from(sorted(at))) if isinstance(at, dict) else draw(st.integers(0, len(at) - 1))
        if not isinstance(at[key], (dict, list)) or not at[key] or draw(st.booleans()):
            at[key] = draw(JSON)
            break
        at = at[key]
    return put(path, json.dumps(values).encode())


def change_tensors(path, draw):
    """Another value in place of one within a file of torch's."""
    try:
        values = torch.load(path, weights_only=False)
    except Exception:
        values = {}
    if isinstance(values, dict) and values:
        values[draw(st.sampled_from(sorted(values, key=str)))] = draw(JSON | st.just(torch.zeros(3)))
    put(path, b"")
    torch.save(values, path)


def damage(path, draw):
    how = draw(st.sampled_from(["cut", "bytes", "flip", "json", "change", "torch", "delete", "folder", "fifo"]))
    if path.is_fifo():
        path.unlink()
    content = path.read_bytes() if path.is_file() else b""
    if how == "cut":
        put(path, content[: draw(st.integers(0, max(0, len(content) - 1)))])
    elif how == "bytes":
        put(path, draw(st.binary(max_size=60)))
    elif how == "flip" and content:
        position = draw(st.integers(0, len(content) - 1))
        put(path, content[:position] + bytes([content[position] ^ draw(st.integers(1, 255))]) + content[position + 1 :])
    elif how == "json":
        put(path, json.dumps(draw(JSON)).encode() * draw(st.integers(1, 2)))
    elif how == "change" and path.suffix in (".pt", ".pth"):
        change_tensors(path, draw)
    elif how == "change" and path.suffix == ".json":
        change_json(path, draw)
    elif how == "torch":
        put(path, b"")
        torch.save(draw(JSON), path)
    elif how in ("delete", "folder", "fifo"):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.parent.mkdir(exist_ok=True)
        if how == "folder":
            path.mkdir()
        elif how == "fifo":
            os.mkfifo(path)


def waited(number, frame):
    raise TimeoutError("waits for ever")


def contents(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*") if path.name != "lock"}


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_is_damaged_a_resume_goes_on_or_says_why(stopped, tmp_path_factory, capsys, data):
    argv, folder = stopped
    run = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(folder, run)
    for place in data.draw(st.lists(PLACES, min_size=1, max_size=2)):
        path = run / place
        if path.parent.is_dir() or not os.path.lexists(path.parent):
            damage(path, data.draw)
    before = contents(run)
    signal.signal(signal.SIGALRM, waited)
    signal.alarm(120)
    code = 0
    try:
        main([str(run) if word == str(folder) else word for word in argv] + ["--resume_from_checkpoint", "true"])
    except SystemExit as stop:
        code = stop.code
    signal.alarm(0)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert (code, len(errors)) in ((0, 0), (2, 1))
    assert (run / "model.safetensors").is_file() if code == 0 else contents(run) == before
    shutil.rmtree(run.parent)
