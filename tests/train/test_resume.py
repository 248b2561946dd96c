import json
import os
import re
import shutil
import signal

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import TrainerState

from clpl_moe.common.errors import UserError
from clpl_moe.train import checksums as checksums_module
from clpl_moe.train.__main__ import main
from clpl_moe.train.checkpoint import fault, is_unfinished
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


def forget_checksums(run):
    """As a version of before left its checkpoints."""
    for path in run.glob("checkpoint-*/checksums.json"):
        path.unlink()


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


SEEN_WHEN_LOADED = ("optimizer.pt of nothing", "scheduler.pt of nothing")


@pytest.mark.parametrize(
    ("damage", "checksums"),
    [
        (damage, with_them)
        for damage in DAMAGES
        for with_them in (True, False)
        if with_them or damage not in SEEN_WHEN_LOADED
    ],
)
def test_of_damaged_checkpoints_the_newest_whole_one_is_taken(run, damage, checksums, caplog):
    folder, _ = run
    if not checksums:
        forget_checksums(folder)
    assert newest_checkpoint(folder) == folder / "checkpoint-3"
    DAMAGES[damage](folder / "checkpoint-3")
    assert newest_checkpoint(folder) == folder / "checkpoint-2"
    assert f"{folder / 'checkpoint-3'}" in caplog.text
    assert "this checkpoint is left out" in caplog.text


def test_a_checkpoint_knows_what_was_written(run, monkeypatch):
    """Every file that a resume reads, to the byte; the others are the reader's."""
    checkpoint = run[0] / "checkpoint-3"
    names = {*FILES, "trainer_state.json", "sparse_linear.pt"}
    assert json.loads((checkpoint / "checksums.json").read_text()).keys() == names
    (checkpoint / "README.md").write_text("mine")
    (checkpoint / "config.json").write_text("{}")
    for name in names:
        path = checkpoint / name
        content = path.read_bytes()
        for changed in (
            content[:-1],
            content + b"\n",
            bytes([content[0] ^ 1]) + content[1:],
            content[:-9] + content[-8:],
        ):
            path.write_bytes(changed)
            assert fault(checkpoint) == f"{path}: damaged (changed since the checkpoint was written)"
        path.unlink()
        assert fault(checkpoint) == f"{path}: no such file"
        path.write_bytes(content)
        assert fault(checkpoint) is None
    (checkpoint / "scaler.pt").write_bytes(b"")
    assert "scaler.pt: damaged" in fault(checkpoint)


def test_of_large_files_the_ends_are_known(tmp_path, monkeypatch):
    monkeypatch.setattr(checksums_module, "_BLOCK", 4)
    for size, unseen in ((0, 0), (3, 0), (4, 0), (7, 0), (8, 0), (9, 1), (20, 12)):
        path = tmp_path / "model.safetensors"
        content = bytes(range(size))
        path.write_bytes(content)
        whole = checksums_module._checksum(path)
        same = 0
        for place in range(size):
            path.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
            same += checksums_module._checksum(path) == whole
        assert same == unseen, size


def test_the_state_is_written_last_and_whole(tmp_path, monkeypatch):
    state = TrainerState(global_step=3)
    (tmp_path / "optimizer.pt").write_bytes(b"x")
    for name in ("_checksums", "write_json"):
        with monkeypatch.context() as patch, checksums_module.with_checksums(state):
            patch.setattr(checksums_module, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                state.save_to_json(str(tmp_path / "trainer_state.json"))
        assert is_unfinished(tmp_path)
    with checksums_module.with_checksums(state):
        state.save_to_json(str(tmp_path / "trainer_state.json"))
    assert not is_unfinished(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"optimizer.pt", "trainer_state.json", "checksums.json"}
    checksums_module.compare(tmp_path)
    state.save_to_json(str(tmp_path / "run.json"))  # outside, as transformers does
    assert (tmp_path / "run.json").read_text() == (tmp_path / "trainer_state.json").read_text()


def interrupt(*args):
    raise KeyboardInterrupt


WRONG = {
    "scheduler.pt": (
        {"base_lrs": ["x", "y"]},
        {"base_lrs": 5},
        {"last_epoch": "3"},
        {"last_epoch": None},
        {"_step_count": [1]},
        {"lr_lambdas": 1},
    ),
    "optimizer.pt": (
        {"lr": "0.1"},
        {"betas": (0.9,)},
        {"betas": "xy"},
        {"eps": None},
        {"weight_decay": 10**400},
        {"initial_lr": {}},
        {"foreach": []},
    ),
}


@pytest.mark.parametrize(("name", "wrong"), [(name, wrong) for name in WRONG for wrong in WRONG[name]])
def test_values_of_another_kind_in_a_checkpoint_of_before_are_refused(run, capsys, name, wrong):
    folder, argv = run
    forget_checksums(folder)
    path = folder / "checkpoint-3" / name
    state = torch.load(path, weights_only=True)
    if name == "scheduler.pt":
        state |= wrong
    else:
        state["param_groups"][-1] |= wrong
    torch.save(state, path)
    before = contents(folder)
    assert "checkpoint-3/scheduler.pt or optimizer.pt: does not fit this model (" in refused(argv, capsys)
    assert contents(folder) == before


@pytest.mark.parametrize("damage", SEEN_WHEN_LOADED)
def test_what_shows_when_a_checkpoint_of_before_is_loaded(run, capsys, damage):
    folder, argv = run
    forget_checksums(folder)
    DAMAGES[damage](folder / "checkpoint-3")
    before = contents(folder)
    assert "optimizer.pt: does not fit this model" in refused(argv, capsys)
    assert contents(folder) == before


def test_a_checkpoint_of_before_is_resumed(run):
    folder, argv = run
    forget_checksums(folder)
    main(argv)
    assert [record["step"] for record in read_metrics(folder)] == [1, 2, 3, 4, 4]
    assert fault(folder / "checkpoint-4") is None
    assert (folder / "checkpoint-4" / "checksums.json").is_file()
    assert not (folder / "checksums.json").exists()


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
    forget_checksums(folder)
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
    forget_checksums(folder)
    path = folder / "checkpoint-3" / "colbert_linear.pt"
    path.unlink() if state is None else torch.save(state, path)
    before = contents(folder)
    assert "colbert_linear.pt: does not fit this model" in refused(argv, capsys)
    assert contents(folder) == before


def test_newest_checkpoint(run, caplog):
    folder, _ = run
    forget_checksums(folder)
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
OF_A_CHECKPOINT = (
    *FILES,
    "trainer_state.json",
    "checksums.json",
    "config.json",
    "tokenizer.json",
    "modules.json",
    "training_args.bin",
)
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
    at = values
    while isinstance(at, (dict, list)) and at:
        key = draw(st.sampled_from(sorted(at, key=str))) if isinstance(at, dict) else draw(st.integers(0, len(at) - 1))
        if not isinstance(at[key], (dict, list)) or not at[key] or draw(st.booleans()):
            at[key] = draw(JSON | st.just(torch.zeros(3)))
            break
        at = at[key]
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
    if data.draw(st.booleans()):
        forget_checksums(run)
    for place in data.draw(st.lists(PLACES, min_size=1, max_size=2)):
        path = run / place
        if path.parent.is_dir() or not os.path.lexists(path.parent):
            damage(path, data.draw)
    before = contents(run)
    code, handler = 0, signal.signal(signal.SIGALRM, waited)
    signal.alarm(120)
    try:
        main([str(run) if word == str(folder) else word for word in argv] + ["--resume_from_checkpoint", "true"])
    except SystemExit as stop:
        code = stop.code
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert (code, len(errors)) in ((0, 0), (2, 1))
    assert (run / "model.safetensors").is_file() if code == 0 else contents(run) == before
    shutil.rmtree(run.parent)


@pytest.mark.slow
def test_a_run_with_a_frozen_cache_resumes_to_the_same_weights(tiny_encoder, data, tmp_path):
    """The cache is empty then, and fills with the same states."""
    options = {"num_experts": 0, "trainable": "full", "frozen_layers": 1, "frozen_cache_gb": 0.1, "use_cpu": True}
    options |= {"save_strategy": "steps", "save_steps": 3, "max_steps": 7}
    main(arguments(tiny_encoder, data, tmp_path / "whole", **options))
    argv = arguments(tiny_encoder, data, tmp_path / "cut", **options)
    train_until(argv, 5)
    main([*argv, "--resume_from_checkpoint", "true"])
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]
