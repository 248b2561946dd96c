"""Activations that round well to 8 bits: what a channel has far above the others goes over to the weights."""

import pytest
import torch
import torch.nn.functional as F

from clpl_moe import Encoder, MoEConfig, inject_moe
from clpl_moe.encoder.settings import EmbeddingSettings
from clpl_moe.export import export, onnx_graph
from clpl_moe.export.experts import compute_all_experts
from clpl_moe.export.int8 import smooth
from helpers.tiny import make_encoder, perturb_experts
from helpers.trained_tokenizers import COVERED, OTHER


@pytest.fixture
def encoder(tiny_tokenizer):
    """States have a channel 20 times above the others, as XLM-R's have some; what reads them hardly uses it."""
    torch.manual_seed(0)
    encoder = Encoder(
        make_encoder(vocab_size=len(tiny_tokenizer), max_position_embeddings=130),
        tiny_tokenizer,
        EmbeddingSettings("mean", True, "query: ", "passage: "),
        100,
        compute_dtype=torch.float32,
    )
    model = encoder.model
    norms = [model.embeddings.LayerNorm]
    norms += [
        norm for layer in model.encoder.layer for norm in (layer.attention.output.LayerNorm, layer.output.LayerNorm)
    ]
    with torch.no_grad():
        for norm in norms[:-1]:
            norm.weight[3] = 20
        for layer in model.encoder.layer:
            own = layer.attention.self
            for linear in (own.query, own.key, own.value, layer.intermediate.dense):
                linear.weight[:, 3] /= 20
    return encoder


def rounded(x: torch.Tensor, dim=None) -> torch.Tensor:
    """In 8 bits, with one scale or one for each row."""
    step = (x.abs().amax(dim, keepdim=True) if dim is not None else x.abs().max()) / 127
    return (x / step).round() * step


@pytest.mark.parametrize("experts", [None, MoEConfig(num_experts=2)], ids=["dense", "experts"])
def test_smooth_layers_compute_the_same_and_round_better(encoder, experts):
    if experts is not None:
        perturb_experts(inject_moe(encoder, experts).model)
    compute_all_experts(encoder.model)
    graph = onnx_graph._Graph(encoder).eval()
    batch = dict(encoder.tokenizer(COVERED, padding=True, return_tensors="pt"))
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}

    def embed(in_8_bits: bool) -> torch.Tensor:
        def linear(x, weight, bias=None):
            return plain(rounded(x), rounded(weight, 1), bias) if in_8_bits else plain(x, weight, bias)

        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            plain = F.linear
            patch.setattr(F, "linear", linear)
            return graph(**batch)[1]

    before, bad = embed(False), embed(True)
    smooth(graph, encoder, OTHER)
    torch.testing.assert_close(embed(False), before, rtol=1e-4, atol=1e-5)
    lost = [float(1 - torch.cosine_similarity(found, before).min()) for found in (bad, embed(True))]
    assert experts is not None or lost[1] < lost[0] / 5, lost  # another rounding may choose other experts


@pytest.mark.slow
def test_the_graph_in_8_bits_rounds_smooth_activations(encoder, tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    encoder.save(tmp_path / "model")
    monkeypatch.setattr(onnx_graph, "LEAST", dict.fromkeys(onnx_graph.LEAST, 0))  # random weights may lose more
    export(input=tmp_path / "model", output=tmp_path / "out", to="onnx", int8=True)
    assert sorted(path.name for path in (tmp_path / "out/onnx").iterdir()) == ["model.onnx", "model_quantized.onnx"]
    nodes = onnx.load(tmp_path / "out" / onnx_graph.INT8).graph.node
    makers = {output: node.op_type for node in nodes for output in node.output}
    rounded_here = [makers[node.input[0]] for node in nodes if node.op_type == "DynamicQuantizeLinear"]
    assert (
        rounded_here == ["Mul"] * 10
    )  # query, key, value, attention's output and the first half of the FFN, in two layers
