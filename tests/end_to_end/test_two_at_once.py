"""Each command while another process writes its output: exit code 2 at once, who it is, and nothing changed."""

import json
import subprocess
import sys
import time

import pytest
import yaml

from clpl_moe.ablate.__main__ import main as ablate
from clpl_moe.card import main as card
from clpl_moe.common.output import WORK_FOLDER
from clpl_moe.convert.__main__ import main as convert
from clpl_moe.evaluate.__main__ import main as evaluate
from clpl_moe.export.__main__ import main as export
from clpl_moe.judge.__main__ import main as judge
from clpl_moe.merge.__main__ import main as merge
from clpl_moe.mine.__main__ import main as mine
from clpl_moe.prepare.__main__ import main as prepare
from clpl_moe.quickstart.__main__ import main as quickstart
from clpl_moe.report.__main__ import main as report
from clpl_moe.small_encoder.__main__ import main as small_encoder
from clpl_moe.synthesize.__main__ import main as synthesize
from clpl_moe.train.__main__ import main as train
from helpers.ablation import TRAIN, make_collection
from helpers.holding import held
from helpers.reports import make_data
from helpers.squad_files import many, squad
from helpers.synthesis import train_file
from helpers.tiny_training import arguments, write_triplets

# The command, its output, whether that is a folder filled in place, and the argument that names it.
COMMANDS = {
    "prepare": (prepare, "out/ko", False),
    "convert": (convert, "out/train.jsonl", False),
    "mine": (mine, "out/train.jsonl", False),
    "evaluate": (evaluate, "out", True),
    "synthesize": (synthesize, "out/train.journal.jsonl", False),
    "judge": (judge, "out/train.journal.jsonl", False),
    "train": (train, "out", True),
    "resume": (train, "out", True),
    "merge": (merge, "out", False),
    "export": (export, "out", False),
    "ablate": (ablate, "out/ablation.json", False),
    "report": (report, "out", False),
    "card": (card, "run", True),
    "small_encoder": (small_encoder, "out", False),
    "quickstart": (quickstart, "results", True),
}


def command_line(command, folder, model):
    output = folder / COMMANDS[command][1]
    data = make_collection(folder / "data")
    short = ["--query_max_len=20", "--passage_max_len=20"]
    languages = {"ko": {"collection": str(data)}}
    ablation = {"model": str(model), "languages": languages, "rows": {"a": {"train": TRAIN}}, "output": str(output)}
    (folder / "ablation.yaml").write_text(yaml.safe_dump(ablation | {"runs": str(folder / "runs")}))
    return {
        "prepare": ["--squad", squad(folder / "s.json", *many(4)), "--output", output.parent, "--language=ko"],
        "convert": ["--train_data", write_triplets(folder / "t.jsonl", 8), "--to=flag_embedding", "--output", output],
        "mine": ["--model", model, "--collection", data, "--language=ko", "--output", output, *short],
        "evaluate": ["--model", model, "--collection", data, "--languages=ko", "--output", output, *short],
        "synthesize": [
            *("--train_data", train_file(folder, 4), "--language=ko", "--model=writer"),
            *("--base_url=http://127.0.0.1:9/v1", "--output", output.parent / "train.jsonl"),
        ],
        "judge": [
            *("--train_data", train_file(folder, 4), "--language=ko", "--model=writer", "--ask=all"),
            *("--base_url=http://127.0.0.1:9/v1", "--output", output.parent / "train.jsonl"),
        ],
        "train": arguments(model, write_triplets(folder / "t.jsonl", 8), output),
        "resume": arguments(model, write_triplets(folder / "t.jsonl", 8), output, resume_from_checkpoint=True),
        "merge": [model, output, "--with", model],
        "export": [model, output],
        "ablate": ["--config", folder / "ablation.yaml"],
        "report": [make_data(folder / "report") / "run", "--output", output],
        "card": ["--run", folder / "run", "--after", make_data(folder / "card") / "after"],
        "small_encoder": ["--output", output],
        "quickstart": ["--model", model, "--output_dir", folder / "out", "--results", output],
    }[command]


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_that_another_process_writes_is_left_to_it(tiny_encoder, tmp_path, capsys, command):
    main, name, inside = COMMANDS[command]
    output = tmp_path / name
    argv = list(map(str, command_line(command, tmp_path, tiny_encoder)))
    with held(output, inside=inside) as process:
        before = files(tmp_path)
        started = time.monotonic()
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert f"error: {output}: process {process.pid} on " in error
        assert "Traceback" not in error
        assert files(tmp_path) == before
        assert time.monotonic() - started < 300  # a second, where the machine is idle; the other process takes 600
    lock = output / WORK_FOLDER / "lock" if inside else output.with_name(f".{output.name}.clpl_moe") / "lock"
    assert json.loads(lock.read_text())["pid"] == process.pid


# A command that says when it has its output, and waits for a line before it goes on; at its end, what it has loaded of the
# libraries that take long.
COMMAND = """
import atexit, runpy, sys
from clpl_moe.common.lock import FileLock

take, first = FileLock.take, True

def taking(lock):
    global first
    taken = take(lock)
    if taken and first:
        first = False
        print("taken", flush=True)
        sys.stdin.readline()
    return taken

FileLock.take = taking
atexit.register(lambda: print({"torch", "transformers", "datasets", "FlagEmbedding"} & sys.modules.keys(), flush=True))
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""
# Here they would fail, or take long.
WITHOUT_END = ("synthesize", "judge", "card", "small_encoder", "quickstart", "ablate")


def module_of(command):
    return f"clpl_moe.{'train' if command == 'resume' else command}"


def start(command, argv):
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([sys.executable, "-c", COMMAND, module_of(command), *argv], text=True, **pipes)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_of_two_at_once_one_goes_on(tiny_encoder, tmp_path, command):
    output = tmp_path / COMMANDS[command][1]
    argv = list(map(str, command_line(command, tmp_path, tiny_encoder)))
    two = [start(command, argv) for _ in range(2)]
    try:
        # The one that is refused ends, the other waits for a line.
        while not any(ended := [process.poll() is not None for process in two]):
            time.sleep(0.05)
        refused, goes_on = two if ended[0] else reversed(two)
        assert refused.returncode == 2
        assert goes_on.stdout.readline() == "taken\n"
        error = refused.stderr.read()
        assert f"process {goes_on.pid} on " in error
        assert "Traceback" not in error
        # A third one, which comes later, is told within a second: before it loads what takes longer.
        later = start(command, argv)
        said, error = later.communicate()
        assert later.returncode == 2
        assert f"error: {output}: process {goes_on.pid} on " in error
        assert said == "set()\n"
        if command in WITHOUT_END:
            return
        _, error = goes_on.communicate("\n")
        assert goes_on.returncode == 0, error
    finally:
        for process in two:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("given", [["--dry_run", "true"], ["--dry_run"]])
def test_a_plan_is_made_beside_a_run(tiny_encoder, tmp_path, capsys, given):
    (tmp_path / "out").mkdir()
    argv = arguments(tiny_encoder, write_triplets(tmp_path / "t.jsonl", 8), tmp_path / "out")
    with held(tmp_path / "out", inside=True):
        train([*argv, *given])
    assert "examples        8" in capsys.readouterr().out
