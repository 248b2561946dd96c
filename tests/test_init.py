import subprocess
import sys

import pytest

import clpl_moe
from helpers.tiny import make_moe


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
    assert set(clpl_moe.__all__) == set(dir(clpl_moe)) == {"__version__", *clpl_moe._PUBLIC}
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
    output, errors = start(script).communicate(timeout=60)
    assert (output.strip(), errors) == ("", "")


@pytest.mark.parametrize(
    "order",
    [
        # The first loads transformers' registries in the middle of a module that ours needs.
        "import clpl_moe; from transformers import XLMRobertaModel, AutoModel",
        pytest.param("import clpl_moe; from transformers import AutoModel", marks=pytest.mark.slow),
        pytest.param("from transformers import AutoModel; import clpl_moe", marks=pytest.mark.slow),
        pytest.param(
            "import clpl_moe.moe.modeling_clpl_moe; from transformers import AutoModel",
            marks=pytest.mark.slow,
        ),
        pytest.param("from clpl_moe import inject_moe; from transformers import AutoModel", marks=pytest.mark.slow),
    ],
)
def test_auto_model_knows_the_experts_whatever_is_imported_first(tmp_path, order):
    make_moe().save_pretrained(tmp_path)
    check = """
import sys
model = AutoModel.from_pretrained(sys.argv[1])
left = [finder for finder in sys.meta_path if "clpl_moe" in type(finder).__module__]
print(type(model).__module__, type(model).__name__, left)
"""
    output, errors = start(f"{order}\n{check}", tmp_path).communicate(timeout=120)
    assert output.strip() == "clpl_moe.moe.modeling_clpl_moe MoEXLMRobertaModel []", errors
