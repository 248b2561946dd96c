"""Model folders in versions of transformers that this package itself does not run with; scripts/test_tools.sh installs them."""

import os
import subprocess

import pytest
import torch

from clpl_moe import Encoder, MoEConfig, inject_moe, merge_experts
from helpers.tiny import perturb_experts
from helpers.tools import need_python

PYTHONS = os.environ.get("OTHER_PYTHONS", "").split()

LOAD = """
import sys
import torch, transformers
tokens = torch.load(sys.argv[2])
try:
    model = transformers.AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
except Exception as error:
    print(transformers.__version__, error)
else:
    with torch.no_grad():
        torch.save(model(**tokens).last_hidden_state, sys.argv[3])
    print(transformers.__version__)
"""


@pytest.fixture
def load(tmp_path):
    tokens = {"input_ids": torch.arange(4, 24).view(2, 10), "attention_mask": torch.ones(2, 10, dtype=torch.int64)}
    tokens["attention_mask"][1, 6:] = 0
    torch.save(tokens, tmp_path / "tokens.pt")

    def load(python, encoder, name):
        """What this interpreter prints of a saved encoder, its states, and ours."""
        encoder.save(tmp_path / name)
        argv = [python, "-c", LOAD, *(str(tmp_path / file) for file in (name, "tokens.pt", "states.pt"))]
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        env["HF_MODULES_CACHE"] = str(tmp_path / f"{name}-modules")
        run = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr[-2000:]
        with torch.no_grad():
            ours = encoder.model(**tokens).last_hidden_state[tokens["attention_mask"].bool()]
        states = tmp_path / "states.pt"
        theirs = torch.load(states)[tokens["attention_mask"].bool()] if states.exists() else None
        return run.stdout.strip(), theirs, ours

    return load


@pytest.mark.slow
@pytest.mark.parametrize("python", PYTHONS or [""])
def test_a_folder_with_experts_loads_or_names_what_does(tiny_encoder, load, python):
    if not python:
        need_python("OTHER_PYTHONS")
    encoder = inject_moe(Encoder.load(tiny_encoder, device="cpu"), MoEConfig(num_experts=2))
    perturb_experts(encoder.model)
    printed, theirs, ours = load(python, encoder, "experts")
    if int(printed.split(".")[0]) >= 5:
        torch.testing.assert_close(theirs, ours)
    else:
        assert "needs transformers 5.0 or later" in printed
        assert "clpl-moe merge" in printed
        assert theirs is None
    merge_experts(encoder)
    _, theirs, ours = load(python, encoder, "merged")
    torch.testing.assert_close(theirs, ours)
