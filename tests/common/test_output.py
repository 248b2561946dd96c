import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from clpl_moe.common.errors import UserError
from clpl_moe.common.output import WORK_FOLDER, atomic_dir, writing

# Writes an output and is killed at the nth change of a name or file in it, or sleeps in the block.
WRITE = """
import os, signal, sys, time
from pathlib import Path
from clpl_moe.common import output as module
from clpl_moe.common.output import atomic_dir, writing

path, when = Path(sys.argv[1]), sys.argv[2]
if when.isdigit():
    left = int(when)

    def killing(function):
        def call(*args, **kwargs):
            global left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return function(*args, **kwargs)
        return call

    for name in ("rename", "unlink", "write_text", "mkdir"):
        setattr(Path, name, killing(getattr(Path, name)))
    module.shutil.rmtree = killing(module.shutil.rmtree)
with atomic_dir(path) as folder:
    for name in "abc":
        (folder / name).write_text("new")
    if when == "sleep":
        print("ready", flush=True)
        time.sleep(600)
print("done")
"""


def write(path, when):
    return subprocess.Popen([sys.executable, "-c", WRITE, str(path), when], stdout=subprocess.PIPE, text=True)


def content(folder):
    return {file.name: file.read_text() for file in folder.iterdir()}


@pytest.mark.parametrize("inside", [False, True])
def test_nobody_else_writes_it_meanwhile(tmp_path, inside):
    refusals = []

    def other():
        with pytest.raises(UserError) as error, writing(tmp_path / "out", inside=inside):
            pass
        refusals.append(str(error.value))

    with writing(tmp_path / "out", inside=inside) as output:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        with writing(tmp_path / "out", inside=inside) as again:  # a function that calls another
            assert again is output
        assert output.work.is_dir()
    assert "another thread" in refusals[0]
    assert list(tmp_path.iterdir()) == ([tmp_path / "out"] if inside else [])


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no kills here")
def test_the_message_names_who_writes_it(tmp_path):
    process = write(tmp_path / "out", "sleep")
    assert process.stdout.readline() == "ready\n"
    with pytest.raises(UserError) as error, writing(tmp_path / "out"):
        pass
    process.kill()
    process.communicate()
    who = f"{tmp_path / 'out'}: process {process.pid} on {socket.gethostname()} writes this output since 20"
    assert str(error.value).startswith(who)
    assert len(list(tmp_path.iterdir())) == 1  # unfinished
    with atomic_dir(tmp_path / "out") as folder:
        (folder / "a").write_text("mine")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert content(tmp_path / "out") == {"a": "mine"}


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no kills here")
def test_a_folder_is_whole_wherever_its_replacement_is_killed(tmp_path):
    states = []
    for number in range(100):
        folder = tmp_path / str(number)
        folder.mkdir()
        old = folder / "out"
        old.mkdir()
        for name in "abcd":
            (old / name).write_text("old")
        code = write(old, str(number)).wait()
        if code == 0:
            break
        assert code == -signal.SIGKILL
        # The old one, the new one, or none under this name for a moment: never a part.
        now = content(old) if old.exists() else None
        assert now in (None, dict.fromkeys("abcd", "old"), dict.fromkeys("abc", "new"))
        with writing(old):
            pass
        states.append(content(old))
        assert states[-1] in (dict.fromkeys("abcd", "old"), dict.fromkeys("abc", "new"))
        assert [path.name for path in folder.iterdir()] == ["out"]
    else:
        raise AssertionError("it never ended")
    assert len(set(map(str, states))) == 2


def test_embeddings_outlive_an_interruption(tmp_path):
    path = tmp_path / "out"

    def work(error):
        with contextlib.suppress(error), writing(path, inside=True) as output:
            output.embeddings.mkdir(exist_ok=True)
            raise error
        return sorted(p.name for p in (path / WORK_FOLDER).glob("*"))

    assert work(UserError) == []
    assert work(KeyboardInterrupt) == ["embeddings", "lock"]
    assert work(OSError) == ["embeddings", "lock"]
    assert work(UserError) == []


@pytest.mark.parametrize("inside", [True, False])
def test_what_a_dead_process_has_not_finished_goes_wherever_it_lies_now(tmp_path, inside):
    def work(folder, error=None):
        path = folder if inside else folder / "out.jsonl"
        with contextlib.suppress(KeyError), writing(path, inside=inside) as output:
            files = [folder / "ko" / "run.trec", folder / "metrics.json"]
            assert not any(file.exists() for file in files)
            with output.unfinished(*files):
                files[0].parent.mkdir(exist_ok=True)
                files[0].write_text("half")
                if error is not None:
                    raise error
                files[1].write_text("whole")

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    work(tmp_path / "b" / ".." / "a", KeyError())
    (tmp_path / "a" / "mine").write_text("of another")
    work(tmp_path / "a", KeyError())
    (tmp_path / "link").symlink_to(tmp_path / "a")
    work(tmp_path / "link", KeyError())
    (tmp_path / "a").rename(tmp_path / "moved")
    work(tmp_path / "moved")
    assert sorted(path.name for path in (tmp_path / "moved").iterdir()) == ["ko", "metrics.json", "mine"]


def test_nothing_outside_of_the_output_counts_as_unfinished(tmp_path):
    (tmp_path / "precious").write_text("mine")
    work = tmp_path / "out" / WORK_FOLDER
    work.mkdir(parents=True)
    (work / "lock").touch()
    (work / "unfinished").write_text(json.dumps(["../precious", str(tmp_path / "precious"), "x/../../precious"]))
    with writing(tmp_path / "out", inside=True):
        assert (tmp_path / "precious").exists()


def test_somebody_elses_folder_stays(tmp_path):
    other = tmp_path / "out" / WORK_FOLDER
    other.mkdir(parents=True)
    (other / "embeddings").write_text("mine")
    with pytest.raises(UserError, match="found another folder"), writing(tmp_path / "out", inside=True):
        pass
    assert content(other) == {"embeddings": "mine"}


def test_places_that_no_folder_can_be_made_at(tmp_path, monkeypatch):
    """As in /proc, also for root."""

    def refuse(*args, **kwargs):
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with (
        pytest.raises(UserError, match=r"lock: cannot be written \(No such file or directory\)"),
        writing(tmp_path / "a"),
    ):
        pass


def test_a_link_is_replaced_and_not_what_it_names(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a").write_text("old")
    (tmp_path / "out").symlink_to(tmp_path / "there")
    with atomic_dir(tmp_path / "out") as folder:
        (folder / "a").write_text("new")
    assert not (tmp_path / "out").is_symlink()
    assert (content(tmp_path / "out"), content(tmp_path / "there")) == ({"a": "new"}, {"a": "old"})


def test_of_several_processes_the_first_one_has_the_lock(tmp_path, monkeypatch):
    with writing(tmp_path / "out", inside=True) as first:
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", "1")
        with writing(tmp_path / "out", inside=True) as second:
            assert not second.first
            assert second.embeddings == first.embeddings
    assert list((tmp_path / "out").iterdir()) == []


def test_a_process_that_is_refused_waits_for_the_holder_s_name(tmp_path, monkeypatch):
    """Between taking a lock and writing one's name into it is a moment."""
    found = [{}, {}, {"host": "there", "pid": 7, "since": "now"}]
    monkeypatch.setattr("clpl_moe.common.lock.FileLock.take", lambda self: False)
    monkeypatch.setattr("clpl_moe.common.lock.FileLock.holder", lambda self: found.pop(0))
    with pytest.raises(UserError, match="process 7 on there writes this output"), writing(tmp_path / "out"):
        pass
