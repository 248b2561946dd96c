"""Written under the names of 2024, and read again."""

import json

import pytest
import torch
from safetensors.torch import load_file

from clpl_moe import Encoder, MoEConfig, UserError, inject_moe
from clpl_moe.export import export
from helpers.tiny import perturb_experts

TEXTS = ["red house", "대한민국의 수도"]


def tuned(model, folder, **options):
    encoder = inject_moe(Encoder.load(model, device="cpu", compute_dtype=torch.float32), MoEConfig(**options))
    perturb_experts(encoder.model)
    encoder.save(folder)
    return encoder


@pytest.mark.parametrize(
    "options",
    [{"num_experts": 2}, {"num_experts": 3, "top_k": 2, "target": "output", "layers": [1]}],
)
def test_a_model_comes_back(tiny_encoder, tmp_path, options):
    encoder = tuned(tiny_encoder, tmp_path / "model", **options)
    export(input=tmp_path / "model", output=tmp_path / "2024", to="2024")
    config = json.loads((tmp_path / "2024/config.json").read_text())
    target = options.get("target", "intermediate")
    assert (config["model_type"], config["architectures"]) == ("xlm-roberta", ["XLMRobertaModel"])
    assert (config["moe"], config["only_train"], config["num_experts"]) == (target, target, options["num_experts"])
    assert config["num_experts_per_tok"] == options.get("top_k", 1)
    assert "auto_map" not in config
    assert not list((tmp_path / "2024").glob("*.py"))
    names = load_file(tmp_path / "2024/model.safetensors")
    number = options["num_experts"] - 1
    assert f"encoder.layer.1.{target}.dense.experts.{number}.weight" in names
    assert names[f"encoder.layer.1.{target}.dense.gate.weight"].shape[0] == options["num_experts"]
    assert not any("router" in name for name in names)
    found = Encoder.load(tmp_path / "2024", device="cpu", compute_dtype=torch.float32)
    weights, expected = found.model.state_dict(), encoder.model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    # To the last digit on some processors only: MKL's products depend on where in memory the weights lie.
    torch.testing.assert_close(found.encode_queries(TEXTS), encoder.encode_queries(TEXTS))
    assert found.model.config.moe["router"] == "topk_softmax"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (None, "2024 is a format of models with experts, found a dense one"),
        ({"target": "ffn"}, "found experts of ffn, expected intermediate or output"),
        ({"router": "given"}, "found the router given, expected topk_softmax or straight_through"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(tiny_encoder, tmp_path, options, message):
    model = tiny_encoder
    if options is not None:
        model = tmp_path / "model"
        tuned(tiny_encoder, model, **options)
    with pytest.raises(UserError, match=f"to: {message}"):
        export(input=model, output=tmp_path / "out", to="2024")
    assert not (tmp_path / "out").exists()
