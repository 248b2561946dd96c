import subprocess
import sys

import pytest

WITHOUT = """
import importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {missing!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)

sys.meta_path.insert(0, Missing())
"""
REMOVED = "transformers.modeling_attn_mask_utils"


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_module_that_newer_transformers_lacks_is_not_needed():
    code = f"""
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == {REMOVED!r} else real(name, package)
import clpl_moe.data.flag_embedding as parents, sys, torch
print(parents.EncoderOnlyEmbedderM3Trainer.__name__, {REMOVED!r} in sys.modules)
print(torch.fx.symbolic_trace(torch.nn.Identity())(torch.tensor(5)))  # what FlagEmbedding gave to torch.fx.wrap is found
"""
    done = run(code)
    assert done.stdout.split() == ["EncoderOnlyEmbedderM3Trainer", "False", "tensor(5)"], done.stderr[-2000:]


@pytest.mark.slow
def test_without_flag_embedding_training_says_what_to_install():
    code = (
        WITHOUT.format(missing="FlagEmbedding")
        + """
from clpl_moe.train.__main__ import main
main(["--model_name_or_path", "m", "--train_data", "x", "--output_dir", "y"])
"""
    )
    done = run(code)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert "error: training is built on FlagEmbedding, which cannot be imported" in done.stderr
    assert "pip install --upgrade clpl-moe" in done.stderr
