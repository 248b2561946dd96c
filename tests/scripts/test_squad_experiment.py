import os
import shutil
import subprocess
from pathlib import Path


def test_the_experiment_belongs_to_one_file_and_leaves_its_results_beside_it(tmp_path):
    """``scripts/squad_experiment.sh`` in a repository and with a ``python`` that are stand-ins."""
    root, bin, here = tmp_path / "repository", tmp_path / "venv" / "bin", tmp_path / "here"
    bin.mkdir(parents=True)
    here.mkdir()
    shutil.copytree(Path(__file__).parents[2] / "scripts", root / "scripts")
    (bin / "python").write_text(f'#!/bin/sh\necho "$@" >> "{tmp_path}/calls"\n')
    (bin / "python").chmod(0o755)
    (bin / "activate").write_text(f'PATH="{bin}:$PATH"\n')
    (bin.parent / ".installed").touch()
    for name in ("a", "b"):
        (here / f"{name}.json").write_text(name)

    def run(file, **variables):
        """Exit code, stderr, and what was called."""
        (tmp_path / "calls").write_text("")
        environment = os.environ | {"VENV": str(bin.parent), **variables}
        script = ["bash", str(root / "scripts" / "squad_experiment.sh"), "ko", file, "--seed", "1"]
        done = subprocess.run(script, cwd=here, env=environment, capture_output=True, text=True)
        return done.returncode, done.stderr, (tmp_path / "calls").read_text().splitlines()

    code, err, calls = run("a.json")
    assert code == 0, err
    assert [call.split()[1] for call in calls[:-1]] == [
        f"clpl_moe.{name}" for name in ("small_encoder", "prepare", "mine", "train", "evaluate")
    ]
    assert f"--squad {here}/a.json " in calls[1]
    assert calls[3].endswith(" --seed 1")
    assert calls[-1].split()[-1] == "runs/squad_ko/results.json"
    (here / "a.json").rename(here / "renamed.json")
    code, err, calls = run("renamed.json", OUTPUT="mine.json")
    assert (code, calls[-1].split()[-1]) == (0, f"{here}/mine.json"), err
    for file, words in (("b.json", "move or remove the folder"), ("none.json", "none.json: no such file")):
        code, err, calls = run(file)
        assert (code, err.count("\n"), calls) == (2, 1, [])
        assert err.startswith("error: ")
        assert words in err
    # What an earlier version left: nobody knows of which file.
    (root / "runs" / "squad_ko" / "source.sha256").rename(root / "runs" / "squad_ko" / "train.jsonl")
    assert run("renamed.json")[0] == 2
