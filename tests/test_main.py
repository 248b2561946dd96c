import importlib.util
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import clpl_moe
from clpl_moe.__main__ import VERBS, main
from clpl_moe.common import cli
from helpers.timing import processor_time


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command in this process; returns its exit code and what it writes."""

    def call(*argv, program="clpl-moe"):
        monkeypatch.setattr(sys, "argv", [program, *argv])
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()

    yield call
    cli.called_as(None)


def test_each_room_with_a_command_is_a_verb():
    rooms = {
        name for _, name, _ in pkgutil.iter_modules(clpl_moe.__path__) if importlib.util.find_spec(f"clpl_moe.{name}")
    }
    commands = {name for name in rooms if (Path(clpl_moe.__path__[0]) / name / "__main__.py").is_file()}
    assert commands | {"card"} == set(VERBS)


def test_the_list_of_commands_comes_at_once():
    """Nothing heavy is imported."""
    script = "import sys, clpl_moe.__main__ as m; m.main(); print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    seconds, printed = processor_time(sys.executable, "-c", script, "--help")
    *listed, heavy = printed.splitlines()
    assert heavy == "[]"
    for verb, description in VERBS.items():
        assert any(line.split() == [verb, *description.split()] for line in listed)
    assert seconds < 1


@pytest.mark.parametrize("argv", [[], ["-h"], ["help"]])
def test_no_verb_gets_the_help(run, argv):
    code, out, err = run(*argv)
    assert (code, err) == (0, "")
    assert out.startswith("usage: clpl-moe COMMAND ")


def test_version(run):
    assert run("--version") == (0, f"clpl-moe {clpl_moe.__version__}\n", "")


@pytest.mark.parametrize(
    ("word", "hint"),
    [("evalute", "did you mean 'evaluate'?"), ("xyzzy", "--help lists"), ("--verison", "--help lists")],
)
def test_unknown_verbs(run, word, hint):
    code, out, err = run(word, "--model", "m")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: unknown command '{word}'; {hint}")


@pytest.mark.parametrize(
    ("program", "called"), [("/bin/clpl-moe", "clpl-moe"), ("/x/clpl_moe/__main__.py", "python -m clpl_moe")]
)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # other tests of this process import commands
def test_messages_name_the_command_as_it_was_called(run, tmp_path, program, called):
    code, out, _ = run("validate", "--help", program=program)
    assert code == 0
    assert out.startswith(f"usage: {called} validate [")
    assert sys.argv == [program, "--help"]
    assert run("small-encoder", "--help", program=program)[1].startswith(f"usage: {called} small_encoder ")
    code, _, err = run("validate", "--train_data", str(tmp_path / "none.jsonl"), program=program)
    assert code == 2
    assert "none.jsonl: no such" in err


def test_the_package_runs_as_a_module(tmp_path):
    root = Path(clpl_moe.__path__[0]).parent
    for words in (["clpl_moe", "mine"], ["clpl_moe.mine"]):
        done = subprocess.run(
            [sys.executable, "-m", *words, "--modle"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(root)},
        )
        assert done.returncode == 2
        assert done.stderr.startswith("error: unknown option '--modle'; did you mean 'model'")


def test_a_reader_that_has_enough_meets_no_traceback():
    command = f"{sys.executable} -m clpl_moe --help | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("usage: ")
    assert done.stderr == ""
