"""An output without a name, as of a shell's variable that is not set: refused, since as a path it is the current folder."""

import importlib

import pytest

from helpers.evaluating import make_collection
from helpers.tiny_training import write_triplets

ASKED = ["--train_data=../t.jsonl", "--language=ko", "--model=m", "--dry_run=true"]
COMMANDS = [
    ("prepare", "output", ["--beir=..", "--language=ko"]),
    ("convert", "output", ["--collection=../data", "--language=ko", "--to=beir"]),
    ("convert", "output", ["--collection=../data", "--language=ko", "--to=mteb"]),
    ("mine", "output", ["--model=m", "--collection=../data", "--language=ko"]),
    ("evaluate", "output", ["--model=m", "--collection=../data", "--languages=ko"]),
    ("synthesize", "output", ASKED),
    ("judge", "output", [*ASKED, "--ask=all"]),
    ("train", "output_dir", ["--model_name_or_path=m", "--train_data=../t.jsonl"]),
    ("merge", "output", ["--input=m"]),
    ("ablate", "output", ["--config=../ablation.yaml"]),
    ("report", "output", ["--runs=.."]),
    ("small_encoder", "output", []),
    ("quickstart", "model", []),
    ("quickstart", "output_dir", []),
    ("quickstart", "results", []),
]


@pytest.mark.parametrize(("command", "option", "argv"), COMMANDS)
def test_an_output_without_a_name(tmp_path, monkeypatch, capsys, command, option, argv):
    make_collection(tmp_path / "data", "ko")
    write_triplets(tmp_path / "t.jsonl", 2)
    (tmp_path / "ablation.yaml").write_text(
        "model: m\nlanguages: {ko: {collection: data}}\nrows: {a: {}}\noutput: ''\n"
    )
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"clpl_moe.{command}.__main__").main(
            [*argv, *([f"--{option}="] * (command != "ablate"))]
        )
    assert stop.value.code == 2
    assert option in capsys.readouterr().err.splitlines()[-1].partition(": ")[2]
    assert list((tmp_path / "here").iterdir()) == []
