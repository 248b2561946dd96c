"""Synthesis with a server that misbehaves on purpose: training files, its command line, and what it wrote."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from clpl_moe.common.files import read_jsonl, write_jsonl
from clpl_moe.synthesize.__main__ import main

SERVER = Path(__file__).with_name("llm_server.py")
EXAMPLE = SERVER.parents[2] / "examples" / "stand_in_llm.py"
STAND_IN = {"all": "the example"}


class Llm:
    """A server in its own process; the misbehaving one, and what it did."""

    def __init__(self, folder, plan, seconds):
        folder.mkdir()
        self.folder = folder
        (folder / "plan.json").write_text(json.dumps(plan))
        command = [sys.executable, SERVER, folder, str(seconds)]
        if plan == STAND_IN:
            command = [sys.executable, EXAMPLE, "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().strip()

    def hold(self, *names):
        """From now on answers to these wait, or all."""
        (self.folder / "new-hold").write_text(" ".join(names))
        (self.folder / "new-hold").rename(self.folder / "hold")

    def release(self):
        (self.folder / "hold").unlink()

    def held(self):
        """How many answers wait."""
        return len(list(self.folder.glob("held-*")))

    def log(self, *what):
        text = (self.folder / "log.jsonl").read_text()
        entries = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return [entry for entry in entries if not what or entry["what"] in what]


def text(number):
    return f"passage {number}. 이것은 시험을 위한 글이다."


def train_file(folder, count, first=0, each=4, ids=True):
    """A line for every ``each`` passages, these its negatives, none with a query."""
    records = []
    for start in range(first, first + count, each):
        numbers = range(start, min(start + each, first + count))
        record = {"query": f"물음 {start}", "pos": [f"답 {start}"], "neg": [text(n) for n in numbers]}
        record["neg_q"] = [None] * len(numbers)
        if ids:
            record |= {"pos_ids": [f"a{start}"], "neg_ids": [f"p{n}" for n in numbers]}
        records.append(record)
    path = folder / f"train{first}.jsonl"
    write_jsonl(path, records)
    return path


def arguments(server, files, folder, **options):
    url = {"base_url": server.url} if server else {}
    # An answer that came too late for a busy machine would be asked for, and paid for, once more.
    waits = {} if options.get("backend") == "transformers" else {"max_retries": 4, "timeout": 60}
    options = {"language": "ko", "model": "writer"} | waits | url | options
    files = files if isinstance(files, list) else [files]
    argv = ["--train_data", *map(str, files), "--output", str(folder / "out.jsonl")]
    return argv + [f"--{name}={value}" for name, value in options.items()]


def refused(capfd, argv, main=main):
    """The message of a run that ends with exit code 2."""
    with pytest.raises(SystemExit) as exit:
        main(argv)
    captured = capfd.readouterr()
    assert exit.value.code == 2, captured.err
    assert "Traceback" not in captured.err
    return captured.err.splitlines()[-1]


def results(folder):
    """Lines, queries by passage id, and failures by passage id."""
    lines = [record for _, record in read_jsonl(folder / "out.jsonl")]
    store = json_lines(folder / "out.positive_queries.jsonl")
    failures = {i: record["reason"] for record in json_lines(folder / "out.failures.jsonl") for i in record["ids"]}
    return lines, {record["docid"]: record["queries"] for record in store}, failures


def json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class start(subprocess.Popen):  # noqa: N801
    """A command in a process of its own. It writes to files: a pipe that nobody reads meanwhile fills, and holds it up."""

    def __init__(self, module, argv, **environment):
        self.said = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
        super().__init__(
            [sys.executable, "-m", module, *argv],
            stdout=self.said[0],
            stderr=self.said[1],
            env=os.environ | environment,
            # Which tests that run in the background of a shell ignore, and what they start with them.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def communicate(self, timeout=None):
        """Wait for the end; what the command wrote."""
        self.wait(timeout)
        texts = []
        for file in self.said:
            with file:
                file.seek(0)
                texts.append(file.read())
        return tuple(texts)


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def kill_while_answers_are_held(job, server, journal, enough, paid, concurrency):
    """Kill a job after ``enough`` answers of the kinds ``paid``, while all that is under way is with the server, which holds its
    answers: nothing at all is lost. What the job said."""
    wait_for(lambda: len(server.log(*paid)) > enough)
    server.hold()
    wait_for(lambda: server.held() == concurrency)
    job.send_signal(signal.SIGKILL)
    said = job.communicate()
    assert job.returncode == -signal.SIGKILL
    assert len(json_lines(journal)) == 1 + len(server.log(*paid))
    wait_for(lambda: server.held() == 0)
    server.release()
    return said


def good(number):
    return [f"{number}번째 물음은 무엇에 관한 것인가요?"]
