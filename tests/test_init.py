import subprocess
import sys

import pytest

import clpl_moe
from helpers.tiny import make_moe

WAIT = 900  # seconds: on a busy machine processes take minutes to load their modules


def start(script, *arguments):
    """A new interpreter at work on a script."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
    )


def test_public_names_are_there():
    assert set(clpl_moe.__all__) == set(dir(clpl_moe)) == {"__version__", "register", *clpl_moe._PUBLIC}
    for name in clpl_moe.__all__:
        assert getattr(clpl_moe, name) is not None
    assert clpl_moe.CLPLLoss.__module__ == "clpl_moe.loss.clpl"
    with pytest.raises(AttributeError, match="module 'clpl_moe' has no attribute 'CLPLoss'"):
        clpl_moe.CLPLoss  # noqa: B018


def test_import_loads_nothing_heavy():
    """Not even numpy: an import in a command's start costs the user its time."""
    script = """
import sys
before = set(sys.modules)
import clpl_moe
added = {name.split(".")[0] for name in set(sys.modules) - before}
print(*sorted(added & {"torch", "transformers", "numpy", "FlagEmbedding", "sentence_transformers", "yaml"}))
"""
    output, errors = start(script).communicate(timeout=WAIT)
    assert (output.strip(), errors) == ("", "")


LOAD = """
import sys
model = AutoModel.from_pretrained(sys.argv[1])
print(type(model).__module__, type(model).__name__)
"""


@pytest.mark.parametrize(
    "order",
    [
        # Registering imports transformers' registries in the middle of a module that ours needs.
        "import clpl_moe; clpl_moe.register(); clpl_moe.register(); from transformers import XLMRobertaModel, AutoModel",
        pytest.param("from transformers import AutoModel; import clpl_moe", marks=pytest.mark.slow),
        pytest.param(
            "import transformers, clpl_moe; from transformers import AutoModel; clpl_moe.register()",
            marks=pytest.mark.slow,
        ),
        pytest.param("from clpl_moe import inject_moe; from transformers import AutoModel", marks=pytest.mark.slow),
        pytest.param("from clpl_moe import load_encoder; from transformers import AutoModel", marks=pytest.mark.slow),
    ],
)
def test_auto_model_knows_the_experts(tmp_path, order):
    make_moe().save_pretrained(tmp_path)
    output, errors = start(f"{order}\n{LOAD}", tmp_path).communicate(timeout=WAIT)
    assert output.strip() == "clpl_moe.moe.modeling_clpl_moe MoEXLMRobertaModel", errors


def test_auto_model_refuses_experts_that_are_not_registered(tmp_path):
    make_moe().save_pretrained(tmp_path)
    script = f"import clpl_moe; from transformers import AutoModel\n{LOAD}"
    output, errors = start(script, tmp_path).communicate(timeout=WAIT)
    assert "MoEXLMRobertaModel" not in output
    assert "trust_remote_code=True" in errors.strip().splitlines()[-1]


def test_nothing_is_registered_while_transformers_is_being_imported(tmp_path):
    """As when a module of transformers' own imports the package: ours would need the half-imported one."""
    script = """
import sys
from transformers import AutoModel
module = sys.modules["transformers.models.auto.modeling_auto"]
module.__spec__._initializing = True
import clpl_moe
print("clpl_moe.moe.modeling_clpl_moe" in sys.modules)
"""
    output, errors = start(script).communicate(timeout=WAIT)
    assert output.strip() == "False", errors
