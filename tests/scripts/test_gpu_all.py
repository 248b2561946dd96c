import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import training

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_all.sh"


def test_a_part_that_fails_does_not_stop_the_others_and_is_told_by_the_exit_code(tmp_path):
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.write_text('#!/usr/bin/env bash\necho "ran $*"\n[[ "$*" != *"-m pytest"* ]]\n')
    python.chmod(0o755)
    environment = os.environ | {"PATH": f"{python.parent}:{os.environ['PATH']}"}
    done = subprocess.run([SCRIPT, tmp_path / "out"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "== gpu_tests: FAILED" in done.stdout
    logs = {path.stem: path.read_text() for path in (tmp_path / "out").glob("*.log")}
    assert {"gpu_tests", "training_gpu", "many_gpus", "gpu", "encoding_gpu"} <= logs.keys()
    assert "benchmarks/gpu.py" in logs["gpu"]
    assert f"--output {tmp_path}/out/encoding_gpu.json" in logs["encoding_gpu"]


def test_the_contenders_are_known_to_the_benchmark():
    text = SCRIPT.read_text().replace("\\\n", " ")
    named = text.split("--only")[1].split("\n")[0].split('"')[1::2]
    assert len(named) == 4
    assert set(named) <= set(training.CONTENDERS)
