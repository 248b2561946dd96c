import json
import os
import socket
import subprocess
import sys
import time

import pytest

from clpl_moe.retrieval import claims as module
from clpl_moe.retrieval.claims import Claims


@pytest.fixture
def other(tmp_path):
    """Puts a claim of another process there."""

    def put(number=0, machine="another", pid=1):
        holder = {"host": socket.gethostname(), "pid": pid, "since": "2026-01-01", "machine": machine}
        file = Claims(tmp_path).file(number)
        file.write_text(json.dumps(holder))
        return file

    return put


def dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_part_belongs_to_one_and_goes_back_at_the_end(tmp_path):
    with Claims(tmp_path) as claims:
        assert claims.take(3)
        assert claims.take(4)
        assert not claims.take(3)
        holder = json.loads(claims.file(3).read_text())
        assert holder["pid"] == os.getpid()
        claims.release(3)
        assert not claims.file(3).exists()
        assert claims.take(3)
    assert list(tmp_path.iterdir()) == []


def test_a_living_process_on_this_machine_keeps_its_claim(tmp_path, other, monkeypatch):
    monkeypatch.setattr(module, "STALE", 60)
    other(machine=module._machine(), pid=os.getppid())
    with Claims(tmp_path) as claims:
        assert not claims.take(0)
        assert not claims.take(0)


def test_a_dead_process_on_this_machine_loses_it_at_once(tmp_path, other):
    pid = dead_process()
    other(0, module._machine(), pid)
    other(1, "another", pid)  # whose process of this number may live
    with Claims(tmp_path) as claims:
        assert claims.take(0)
        assert not claims.take(1)
    assert [path.name for path in tmp_path.iterdir()] == ["000001.claim"]


def test_of_two_that_take_over_a_claim_one_has_it(tmp_path, other, monkeypatch):
    """Both have seen that its process is dead, and one is slower to move it away."""
    stale = Claims._stale

    def slower(self, number):
        touched = stale(self, number)
        monkeypatch.setattr(Claims, "_stale", stale)
        assert faster.take(number)
        return touched

    file = other(0, module._machine(), dead_process())
    with Claims(tmp_path) as faster, Claims(tmp_path) as claims:
        monkeypatch.setattr(Claims, "_stale", slower)
        assert not claims.take(0)
        assert [path.name for path in tmp_path.iterdir()] == [file.name]
        assert json.loads(file.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", [None, "", "[]", '{"machine": 3}'])
def test_a_claim_that_nobody_touches_is_taken_over(tmp_path, other, monkeypatch, content):
    monkeypatch.setattr(module, "STALE", 0.2)
    file = other()
    if content is not None:
        file.write_text(content)
    os.utime(file, (0, 0))  # whatever another machine's clock says
    with Claims(tmp_path) as claims:
        assert not claims.take(0)
        time.sleep(0.3)
        os.utime(file)
        assert not claims.take(0)  # its process lives
        time.sleep(0.3)
        assert claims.take(0)
        assert json.loads(file.read_text())["pid"] == os.getpid()


def test_claims_are_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BEAT", 0.05)
    with Claims(tmp_path) as claims:
        claims.take(0)
        os.utime(claims.file(0), (0, 0))
        deadline = time.monotonic() + 20
        while claims.file(0).stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert claims.file(0).stat().st_mtime > 0


def test_a_claim_that_was_taken_over_does_no_harm(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BEAT", 0.02)
    with Claims(tmp_path) as claims:
        claims.take(0)
        claims.file(0).unlink()
        time.sleep(0.1)
        claims.release(0)
        assert claims.take(0)
