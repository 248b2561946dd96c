"""Folders with experts, loaded by many processes at once."""

import os
import subprocess
import sys

import pytest

from clpl_moe import Encoder, MoEConfig, inject_moe

# transformers copies the code of a folder into one place for all processes, and not in one step.
LOAD = """
import os, sys
import torch, transformers
import clpl_moe

clpl_moe.register()
from clpl_moe import Encoder  # before the forks: it takes seconds

children = []
for number in range(8):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if number % 2:
                Encoder.load(sys.argv[1], device="cpu")
            else:
                transformers.AutoModel.from_pretrained(sys.argv[1])
            code = 0
        finally:
            os._exit(code)
    children.append(child)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts its processes by fork")
def test_eight_at_once_need_no_cache_of_code(tiny_encoder, tmp_path):
    inject_moe(Encoder.load(tiny_encoder, device="cpu"), MoEConfig(num_experts=2)).save(tmp_path / "model")
    modules = tmp_path / "modules"
    environment = os.environ | {"HF_MODULES_CACHE": str(modules), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOAD, str(tmp_path / "model")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str([0] * 8), done.stderr[-3000:]
    assert not [file for file in modules.rglob("*") if file.name in ("layer.py", "modeling_clpl_moe.py")]
