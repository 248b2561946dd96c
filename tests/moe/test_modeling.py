import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from clpl_moe import MoEConfig, inject_moe
from clpl_moe.moe.install import has_experts
from clpl_moe.moe.modeling_clpl_moe import MOE_CLASSES
from helpers.tiny import DENSE_CLASSES, make_batch, make_encoder, make_moe


@pytest.mark.parametrize("target", ["intermediate", "output", "ffn"])
@pytest.mark.parametrize("kind", list(DENSE_CLASSES))
def test_saved_and_loaded_it_is_the_same(tmp_path, kind, target):
    encoder, batch = make_moe(target, kind=kind, layers=[1], top_k=2), make_batch([9, 4])
    encoder.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"].startswith("clpl_moe_")
    assert config["architectures"] == [type(encoder).__name__]
    assert config["moe"] == MoEConfig(3, 2, target, layers=[1]).to_dict()
    assert config["auto_map"].keys() == {"AutoConfig", "AutoModel"}
    loaded, info = type(encoder).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(loaded.eval()(**batch)[0], encoder(**batch)[0])
    registered = transformers.AutoModel.from_pretrained(tmp_path).eval()
    assert type(registered) is type(encoder)
    torch.testing.assert_close(registered(**batch)[0], encoder(**batch)[0])


@pytest.mark.parametrize("target", ["intermediate", "output", "ffn"])
@pytest.mark.parametrize("kind", list(DENSE_CLASSES))
def test_a_loader_that_does_not_know_the_experts_fails(tmp_path, kind, target):
    make_moe(target, kind=kind, layers=[1]).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size"):
        DENSE_CLASSES[kind][1].from_pretrained(tmp_path)


def test_hidden_states_and_attentions_can_be_had(tmp_path):
    """In a process of its own: transformers learns how when it makes a model of the class."""
    code = """
import sys
sys.path.insert(0, sys.argv[1])
from clpl_moe import merge_experts
from helpers.tiny import make_batch, make_moe
encoder, batch = make_moe(kind="bert"), make_batch([5, 3])
encoder.set_attn_implementation("eager")
for _ in range(2):
    output = encoder(**batch, output_hidden_states=True, output_attentions=True)
    print(len(output.hidden_states), len(output.attentions))
    merge_experts(encoder) if hasattr(encoder.config, "moe") else None
"""
    tests = str(Path(__file__).parents[1])
    run = subprocess.run([sys.executable, "-c", code, tests], capture_output=True, text=True, check=False)
    assert run.stdout.split() == ["3", "2", "3", "2"], run.stderr[-2000:]


def test_code_travels_with_the_weights(tmp_path):
    make_moe().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == {
        "modeling_clpl_moe.py",
        "config.py",
        "dispatch.py",
        "experts.py",
        "install.py",
        "kernel_choice.py",
        "layer.py",
        "layer_state.py",
        "router.py",
    }


def test_the_code_that_travels_needs_only_torch_and_transformers(tmp_path):
    make_moe().save_pretrained(tmp_path)
    for path in tmp_path.glob("*.py"):
        for line in path.read_text().splitlines():
            if line.startswith(("import ", "from ")) and not line.startswith("from ."):
                module = line.split()[1].split(".")[0]
                assert module in {"torch", "transformers"} | sys.stdlib_module_names, f"{path.name}: {line}"


def test_the_modelling_file_imports_itself_all_that_travels(tmp_path):
    """Up to 5.3, transformers copies from a folder what this file imports, and not what those files import."""
    make_moe().save_pretrained(tmp_path)
    text = (tmp_path / "modeling_clpl_moe.py").read_text()
    direct = set(re.findall(r"^from \.(\w+) import", text, re.MULTILINE))
    assert direct == {path.stem for path in tmp_path.glob("*.py")} - {"modeling_clpl_moe"}


def test_transformers_before_5_gets_one_message_that_names_merge(tmp_path):
    make_moe().save_pretrained(tmp_path / "model")
    for name, text in (("transformers", '__version__ = "4.57.0"\n'), ("torch", "nn = None\n")):
        (tmp_path / f"{name}.py").write_text(text)
    code = "import model.modeling_clpl_moe"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    message = run.stderr.strip().splitlines()[-1]
    assert message.startswith(
        "ImportError: this model has experts, whose code needs transformers 5.0 or later, found 4.57.0"
    )
    assert "clpl-moe merge" in message
    assert "During handling" not in run.stderr


def test_weights_can_be_loaded_in_bf16(tmp_path):
    make_moe().save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.encoder.layer[0].intermediate.dense.weight.dtype == torch.bfloat16


def test_a_new_model_from_a_configuration_has_experts():
    config = make_moe(num_experts=4).config
    model = transformers.AutoModel.from_config(config)
    assert model.encoder.layer[0].intermediate.dense.weight.shape == (4, 64, 32)
    assert model(**make_batch([4, 2]))[0].isfinite().all()


def test_weights_that_a_checkpoint_lacks_are_drawn_anew(tmp_path):
    """As transformers does for any model; loading through clpl_moe refuses such a folder instead."""
    encoder = make_moe()
    state = {k: v for k, v in encoder.state_dict().items() if "layer.1.intermediate" not in k}
    encoder.save_pretrained(tmp_path, state_dict=state)
    loaded, info = type(encoder).from_pretrained(tmp_path, output_loading_info=True)
    assert len(info["missing_keys"]) == 3
    layer = loaded.encoder.layer[1].intermediate
    assert 0.1 < layer.dense.weight.std() < 0.3  # the configuration's initializer_range is 0.2
    assert 0.1 < layer.router.weight.std() < 0.3
    assert not layer.dense.bias.any()


def test_an_encoder_of_another_class_keeps_it():
    values = make_encoder().config.to_dict()
    values = {k: v for k, v in values.items() if k not in ("model_type", "architectures")}
    model = inject_moe(transformers.CamembertModel(transformers.CamembertConfig(**values)), MoEConfig())
    assert type(model) is transformers.CamembertModel
    assert has_experts(model)


def test_every_class_has_a_model_type_of_its_own():
    types = [c.config_class.model_type for pair in MOE_CLASSES.items() for c in pair]
    assert len(set(types)) == 6
