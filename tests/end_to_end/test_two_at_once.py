"""Each command while another process writes its output: exit code 2 at once, who it is, and nothing changed."""

import json
import time

import pytest
import yaml

from clpl_moe.ablate.__main__ import main as ablate
from clpl_moe.card import main as card
from clpl_moe.common.output import WORK_FOLDER
from clpl_moe.evaluate.__main__ import main as evaluate
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
    "mine": (mine, "out/train.jsonl", False),
    "evaluate": (evaluate, "out", True),
    "synthesize": (synthesize, "out/train.journal.jsonl", False),
    "train": (train, "out", True),
    "resume": (train, "out", True),
    "ablate": (ablate, "out/ablation.json", False),
    "report": (report, "out", False),
    "card": (card, "run", True),
    "small_encoder": (small_encoder, "out", False),
    "quickstart": (quickstart, "out", True),
}


def command_line(command, folder, model):
    output = folder / COMMANDS[command][1]
    data = make_collection(folder / "data")
    languages = {"ko": {"collection": str(data)}}
    ablation = {"model": str(model), "languages": languages, "rows": {"a": {"train": TRAIN}}, "output": str(output)}
    (folder / "ablation.yaml").write_text(yaml.safe_dump(ablation | {"runs": str(folder / "runs")}))
    return {
        "prepare": ["--squad", squad(folder / "s.json", *many(4)), "--output", output.parent, "--language=ko"],
        "mine": ["--model", model, "--collection", data, "--language=ko", "--output", output],
        "evaluate": ["--model", model, "--collection", data, "--languages=ko", "--output", output],
        "synthesize": [
            *("--train_data", train_file(folder, 4), "--language=ko", "--model=writer"),
            *("--base_url=http://127.0.0.1:9/v1", "--output", output.parent / "train.jsonl"),
        ],
        "train": arguments(model, write_triplets(folder / "t.jsonl", 8), output),
        "resume": arguments(model, write_triplets(folder / "t.jsonl", 8), output, resume_from_checkpoint=True),
        "ablate": ["--config", folder / "ablation.yaml"],
        "report": [make_data(folder / "report") / "run", "--output", output],
        "card": ["--run", folder / "run", "--after", make_data(folder / "card") / "after"],
        "small_encoder": ["--output", output],
        "quickstart": ["--model", model, "--output_dir", output, "--results", folder / "results"],
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
        assert time.monotonic() - started < 20  # a second, on a machine that is not busy
    lock = output / WORK_FOLDER / "lock" if inside else output.with_name(f".{output.name}.clpl_moe") / "lock"
    assert json.loads(lock.read_text())["pid"] == process.pid
