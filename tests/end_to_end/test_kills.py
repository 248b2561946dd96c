import os
import subprocess
import sys
from pathlib import Path

import pytest

from end_to_end.kills import JOBS

KILLS = Path(__file__).with_name("kills.py")


def run(*argv, folder):
    # A file, and no pipe: a server would keep that open.
    with (folder / "said.txt").open("w") as said:
        command = [sys.executable, KILLS, *argv]
        environment = {"PYTHONPATH": str(KILLS.parents[1]), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, stdout=said, stderr=said, env=os.environ | environment, check=False)
    text = (folder / "said.txt").read_text()
    assert done.returncode == 0, text
    return text


@pytest.mark.slow
@pytest.mark.parametrize("command", ["mine", "evaluate", "synthesize", "judge", "prepare", "merge", "export"])
def test_a_killed_job_that_is_run_again_leaves_what_an_undisturbed_one_leaves(tmp_path, command):
    text = run(command, "--times", "3", folder=tmp_path)
    assert "0 faulty" in text, text


@pytest.mark.slow
def test_of_two_at_once_one_goes_on(tmp_path):
    assert run("--together", folder=tmp_path).count("one went on, the other ended with exit code 2") == len(JOBS)
