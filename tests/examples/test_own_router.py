import re
import subprocess
import sys
from pathlib import Path

import pytest

from clpl_moe import UserError, load_encoder

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_router.py"

SAVE = """
import sys
sys.path[:0] = sys.argv[2:]
import own_router
from clpl_moe import MoEConfig, inject_moe, load_encoder
from helpers.tiny import make_encoder, make_tokenizer, perturb_experts
encoder = inject_moe(make_encoder(), MoEConfig(3, 1, router="noisy"))
perturb_experts(encoder)
encoder.save_pretrained(sys.argv[1])
make_tokenizer().save_pretrained(sys.argv[1])
loaded, _ = load_encoder(sys.argv[1])
print(type(loaded.encoder.layer[0].intermediate.router).__name__)
"""

REMOTE = """
import sys
from transformers import AutoModel
AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
"""


def python(*arguments):
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_runs():
    run = python(EXAMPLE)
    assert run.returncode == 0, run.stderr[-2000:]
    changes = re.findall(r"at most (\S+)", run.stdout)
    assert len(changes) == 2
    assert all(float(change) < 1e-5 for change in changes)
    assert "NoisyRouter" in run.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder with the example's router, saved and loaded by a process that knows it; this one does not."""
    folder = tmp_path_factory.mktemp("noisy")
    run = python("-c", SAVE, folder, EXAMPLE.parent, Path(__file__).parents[1])
    assert run.stdout.strip() == "NoisyRouter", run.stderr[-2000:]
    return folder


def test_a_folder_with_an_unknown_router_is_refused_with_its_name(folder):
    with pytest.raises(UserError, match="router is 'noisy': choose one of straight_through.*register_router"):
        load_encoder(folder)


def test_the_folders_own_code_refuses_an_unknown_router_with_its_name(folder):
    run = python("-c", REMOTE, folder)
    assert "router is 'noisy'" in run.stderr.strip().splitlines()[-1], run.stderr[-2000:]
