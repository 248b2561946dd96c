import errno
import json
import os
import socket
import subprocess
import sys
import time

import pytest

from clpl_moe.common import lock as module
from clpl_moe.common.lock import FileLock

HOLD = """
import sys, time
from pathlib import Path
from clpl_moe.common.lock import FileLock

held = FileLock(Path(sys.argv[1]))
assert held.take()
{more}
print("held", flush=True)
time.sleep(600)
"""
# The child of a process that is killed outlives it, as a data loader's worker may.
FORK = """
import os
runs, says = os.pipe()
if (child := os.fork()) == 0:
    os.close(1)
    os.write(says, b".")
    time.sleep(600)
os.read(runs, 1)
print(child, flush=True)
"""


@pytest.fixture
def hold(tmp_path):
    """Starts a process that holds the lock of ``tmp_path / "lock"``."""
    processes = []

    def start(more=""):
        command = [sys.executable, "-c", HOLD.format(more=more), str(tmp_path / "lock")]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        lines = []
        while "held" not in lines:
            lines.append(processes[-1].stdout.readline().strip())
        return processes[-1], lines

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_living_process_keeps_others_out_and_is_named(hold, tmp_path):
    process, _ = hold()
    lock = FileLock(tmp_path / "lock")
    assert not lock.take()
    holder = lock.holder()
    assert (holder["pid"], holder["host"]) == (process.pid, socket.gethostname())
    assert abs(time.time() - (tmp_path / "lock").stat().st_mtime) < 60
    assert holder["since"][:4].isdigit()


@pytest.mark.skipif(sys.platform == "win32", reason="a look is not enough there")
def test_a_look_takes_and_writes_nothing(hold, tmp_path):
    file = tmp_path / "lock"
    assert not FileLock(file).taken()
    assert not file.exists()
    process, _ = hold()
    before = file.read_bytes()
    assert FileLock(file).taken()
    assert file.read_bytes() == before
    process.kill()
    process.wait()
    assert not FileLock(file).taken()
    assert file.read_bytes() == before
    # Another process has the number of the dead one by now.
    file.write_text(json.dumps(json.loads(before) | {"pid": os.getppid()}))
    assert not FileLock(file).taken()


def test_a_dead_process_keeps_nobody_out(hold, tmp_path):
    process, _ = hold()
    process.kill()
    process.wait()
    lock = FileLock(tmp_path / "lock")
    assert not lock.taken()
    assert lock.take()
    assert not lock.taken()  # by another process
    assert lock.holder()["pid"] == os.getpid()
    lock.release()
    assert not (tmp_path / "lock").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
def test_a_forked_child_of_a_dead_process_keeps_nobody_out(hold, tmp_path):
    process, lines = hold(FORK)
    process.kill()
    process.wait()
    child = next(int(line) for line in lines if line.isdigit())
    os.kill(child, 0)  # it lives
    try:
        assert FileLock(tmp_path / "lock").take()
    finally:
        os.kill(child, 9)


def test_two_locks_of_one_process(tmp_path):
    first, second = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    assert first.take()
    assert not second.take()
    first.release()
    assert second.take()
    second.release(keep=True)
    assert (tmp_path / "lock").exists()
    assert first.take()
    first.release()


@pytest.mark.skipif(sys.platform == "win32", reason="files are locked in another way")
@pytest.mark.parametrize("missing", ["the file system's", "Python's"])
def test_without_locks_host_and_process_decide(tmp_path, monkeypatch, missing):
    """As on some network file systems."""

    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    if missing == "Python's":
        monkeypatch.setattr(module, "fcntl", None)
    else:
        monkeypatch.setattr(module.fcntl, "flock", refuse)
    file = tmp_path / "lock"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here = socket.gethostname()
    for holder, taken in (
        ({"host": here, "pid": dead.pid, "since": "then"}, True),
        ({"host": here, "pid": os.getppid(), "since": "then"}, False),
        ({"host": "elsewhere", "pid": dead.pid, "since": "then"}, False),
        ("no holder", True),
    ):
        file.write_text(json.dumps(holder))
        lock = FileLock(file)
        assert lock.taken() is not taken, holder
        assert lock.take() is taken, holder
        assert lock.holder() == (holder if not taken else lock.holder())
        lock.release()
