"""Graphs of OpenVINO: what torch computes, for any batch and length, in the layout of optimum."""

import pytest
import torch

from clpl_moe import Encoder, MoEConfig, UserError, inject_moe
from clpl_moe.encoder.settings import EmbeddingSettings
from clpl_moe.export import export, onnx_graph, openvino_graph
from helpers.tiny import make_encoder, perturb_experts
from helpers.trained_tokenizers import COVERED, OTHER, train_tokenizer


@pytest.fixture
def model(tmp_path):
    """A folder with experts, mean pooling and prompts."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer("xlm-roberta")
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 130, "pad_token_id": tokenizer.pad_token_id}
    settings = EmbeddingSettings("mean", True, "query: ", "passage: ")
    encoder = Encoder(make_encoder("xlm-roberta", **sizes), tokenizer, settings, 100)
    perturb_experts(inject_moe(encoder, MoEConfig(3, 2, "ffn")).model)
    encoder.save(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
def test_a_graph_computes_what_torch_does(model, tmp_path):
    pytest.importorskip("openvino")
    pytest.importorskip("onnxscript")
    exported = export(input=model, output=tmp_path / "out", to="openvino")
    (graph,) = exported.graphs.values()
    assert list(exported.graphs) == ["openvino/openvino_model.xml"]
    assert graph.cosine > 0.9999
    folder = tmp_path / "out" / "openvino"
    assert graph.size == sum(file.stat().st_size for file in folder.iterdir())
    assert not (tmp_path / "out" / "onnx").exists()
    encoder = Encoder.load(model, device="cpu", compute_dtype=torch.float32)
    for texts in (COVERED + OTHER, OTHER[:1], ["a"]):
        found = openvino_graph.openvino_embeddings(folder / "openvino_model.xml", encoder, texts)
        torch.testing.assert_close(found, encoder.encode_passages(texts, progress=False), rtol=1e-3, atol=1e-4)
        assert torch.allclose(found.norm(dim=-1), torch.ones(len(texts)), atol=1e-4)


def test_a_graph_that_computes_something_else_is_not_left(model, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graph, "refuse_missing", lambda to: None)
    monkeypatch.setattr(onnx_graph, "_write_graph", lambda graph, encoder, path: path.write_bytes(b"graph"))
    monkeypatch.setattr(onnx_graph, "graph_embeddings", lambda path, encoder, texts: 1.0)
    monkeypatch.setattr(openvino_graph, "convert", lambda source, target: None)
    monkeypatch.setattr(openvino_graph, "openvino_embeddings", lambda path, encoder, texts: -1.0)
    monkeypatch.setattr(onnx_graph, "_cosine", lambda found, expected: found)
    with pytest.raises(
        UserError, match=r"openvino/openvino_model.xml: an embedding has the cosine .*, expected more than 0.9999"
    ):
        export(input=model, output=tmp_path / "out", to="openvino")
    assert not (tmp_path / "out").exists()
