"""The example runs on a tiny model, lowers the loss, and saves an encoder with experts."""

import subprocess
import sys
from pathlib import Path

import torch

from clpl_moe import Encoder
from clpl_moe.moe.inject import expert_parameters

EXAMPLE = Path(__file__).parents[2] / "examples/training_loop.py"


def run(*arguments):
    return subprocess.run([sys.executable, EXAMPLE, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_it_trains(tmp_path, tiny_encoder):
    done = run(tiny_encoder, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[1]) for line in done.stdout.splitlines()]
    penalties = [float(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(losses) == 6
    assert sum(losses[4:]) < sum(losses[:2])
    assert min(penalties) > 0
    before, after = (Encoder.load(folder, device="cpu") for folder in (tiny_encoder, tmp_path / "run"))
    assert expert_parameters(after.model)
    assert after.max_length == before.max_length
    change = after.encode_queries(["등대"]) - before.encode_queries(["등대"])
    assert 0 < change.abs().max() < 0.5
    torch.testing.assert_close(after.encode_queries(["등대"]).norm(), torch.tensor(1.0))


def test_it_says_how_it_is_called():
    done = run("one")
    assert done.returncode != 0
    assert "usage: python examples/training_loop.py MODEL OUTPUT" in done.stderr
