import contextlib
import os
import signal
import time

import pytest

from clpl_moe.ablate import server as module
from clpl_moe.ablate.server import Server, ServerEnded

JOB = """
import os, sys, time
print("hello from", sys.argv[1], os.environ.get("OWN"), "torch" in sys.modules, flush=True)
if sys.argv[1] == "wait":
    time.sleep(60)
if sys.argv[1] == "fail":
    raise ValueError("out of luck")
sys.exit({"three": 3, "words": "no such thing"}.get(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs")
    (folder / "a_job.py").write_text(JOB)
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    with contextlib.closing(Server(os.environ | {"PYTHONPATH": path})) as server:
        yield server


@pytest.fixture
def start(server, tmp_path):
    """Starts ``a_job`` with a word; its process and its log."""

    def start(word):
        with (tmp_path / f"{word}.log").open("wb") as log:
            process = server.start("a_job", [word], os.environ | {"OWN": "own"}, log.fileno())
        return process, tmp_path / f"{word}.log"

    return start


@pytest.mark.parametrize(
    ("word", "code", "said"),
    [("well", 0, ""), ("three", 3, ""), ("words", 1, "no such thing"), ("fail", 1, "ValueError: out of luck")],
)
def test_a_command_ends_as_it_would_in_a_process_of_its_own(start, word, code, said):
    process, log = start(word)
    assert process.wait() == code
    text = log.read_text()
    assert text.startswith(f"hello from {word} own True\n")
    assert said in text


def test_a_command_can_be_ended(start):
    process, log = start("wait")
    while not log.read_text():
        time.sleep(0.05)
    process.terminate()
    assert process.wait() is None


def test_commands_run_side_by_side(start):
    slow, _ = start("wait")
    quick, _ = start("well")
    assert quick.wait() == 0
    os.kill(slow.pid, signal.SIGKILL)
    assert slow.wait() is None


def test_commands_end_with_a_caller_that_was_killed(tmp_path):
    """Its socket closes then."""
    (tmp_path / "a_job.py").write_text(JOB)
    server = Server(os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])})
    with (tmp_path / "log").open("wb") as log:
        process = server.start("a_job", ["wait"], dict(os.environ), log.fileno())
    while not (tmp_path / "log").read_text():
        time.sleep(0.05)
    began = time.monotonic()
    assert server.close() == 0
    assert process.wait() is None
    assert time.monotonic() - began < 30


def test_no_process_begins_without_a_server(tmp_path):
    server = Server(os.environ | {"PYTHONPATH": "", "PYTHONHOME": str(tmp_path)})  # no Python that could start
    with (tmp_path / "file").open("w") as file, pytest.raises(ServerEnded) as caught:
        server.start("a_job", [], {}, file.fileno())
    assert caught.value.code != 0


def test_a_process_that_could_not_use_cuda_begins_anew(monkeypatch, tmp_path):
    import torch

    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    began = []
    monkeypatch.setattr(os, "execv", lambda program, argv: began.append(argv))
    with (tmp_path / "file").open("w") as file, pytest.raises(SystemExit):
        module.run({"module": "json.tool", "arguments": ["--help"], "status": file.fileno()})
    assert began[0][1:3] == ["-m", "clpl_moe.ablate.server"]
    assert '"json.tool"' in began[0][3]
