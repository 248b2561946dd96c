"""ONNX graphs: what torch computes, for any batch and length, in the layout that other tools look for."""

import importlib.util
import json

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from clpl_moe import Encoder, MoEConfig, UserError, inject_moe
from clpl_moe.encoder.settings import EmbeddingSettings, pool
from clpl_moe.encoder.weights import HEAD_FILES
from clpl_moe.export import export, onnx_graph
from clpl_moe.export.__main__ import main
from helpers.tiny import make_encoder, perturb_experts
from helpers.trained_tokenizers import COVERED, OTHER, train_tokenizer

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs onnx, onnxscript and onnxruntime: the extra onnx",
)


def make(kind, folder, experts=None):
    torch.manual_seed(0)
    tokenizer = train_tokenizer(kind)
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 130, "pad_token_id": tokenizer.pad_token_id}
    settings = (
        EmbeddingSettings("mean", True, "", "passage: ", truncate_dim=20) if kind == "bert" else EmbeddingSettings()
    )
    types = {"type_vocab_size": 2} if kind == "bert" else {}
    encoder = Encoder(make_encoder(kind, **sizes, **types), tokenizer, settings, 100)
    if experts is not None:
        perturb_experts(inject_moe(encoder, experts).model)
    torch.manual_seed(1)
    heads = {name: torch.nn.Linear(32, size).state_dict() for name, size in zip(HEAD_FILES, (1, 16))}
    encoder.save(folder, heads=heads if kind != "bert" else None)
    return encoder


def run(folder, encoder, texts, file=onnx_graph.FLOAT):
    """The outputs by name, for one padded batch; and the states of torch."""
    session = onnx_graph.open_session(folder / file)
    batch = encoder.tokenizer(texts, padding=True, return_tensors="pt")
    names = [node.name for node in session.get_inputs()]
    assert set(names) <= set(batch)
    arrays = session.run(None, {name: batch[name].numpy() for name in names})
    found = dict(zip((node.name for node in session.get_outputs()), map(torch.from_numpy, arrays)))
    with torch.no_grad():
        return found, batch, encoder.model(**batch).last_hidden_state


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "experts", "int8"),
    [
        ("xlm-roberta", None, True),
        # Not in 8 bits: scores of random routers may be so close that they choose other experts.
        ("xlm-roberta", MoEConfig(3, 2, "ffn"), False),
        ("bert", MoEConfig(2, 1, "output"), False),
        ("bert", None, True),
    ],
    ids=["dense", "ffn", "output", "bert"],
)
def test_a_graph_computes_what_torch_does(kind, experts, int8, tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx")
    encoder = make(kind, tmp_path / "model", experts)
    if experts is not None:  # as with a model of more than 2 GB
        monkeypatch.setattr(onnx_graph, "_LARGEST", 20_000)
    exported = export(input=tmp_path / "model", output=tmp_path / "out", to="onnx", int8=int8)
    folder = tmp_path / "out"
    assert exported.graphs["onnx/model.onnx"].cosine > 0.9999
    assert (folder / "onnx/model.onnx_data").exists() == (experts is not None)
    if int8:
        assert exported.graphs["onnx/model_quantized.onnx"].cosine > 0.99
        small = onnx.load(folder / onnx_graph.INT8, load_external_data=False).graph.initializer
        floats = [tuple(tensor.dims) for tensor in small if tensor.data_type == onnx.TensorProto.FLOAT]
        assert (64, 32) in floats  # a layer's output Linear
        assert not {(32, 64), (32, 32)} & set(floats)
    for texts in (COVERED + OTHER, OTHER[:1], ["a"]):
        found, batch, states = run(folder, encoder, texts)
        mask = batch["attention_mask"]
        assert next(iter(found)) == "last_hidden_state"
        torch.testing.assert_close(found["last_hidden_state"][mask.bool()], states[mask.bool()], rtol=1e-3, atol=1e-4)
        pooled = encoder.settings.truncate(F.normalize(pool(states, mask, encoder.settings.pooling), dim=-1))
        torch.testing.assert_close(found["sentence_embedding"], pooled, rtol=1e-3, atol=1e-4)
        if kind == "bert":
            assert list(found) == ["last_hidden_state", "sentence_embedding"]
            continue
        sparse, colbert = (torch.load(tmp_path / "model" / name) for name in HEAD_FILES)
        weights = F.linear(states, **sparse).squeeze(-1).relu()
        special = torch.isin(batch["input_ids"], torch.tensor([0, 1, 2, 3]))
        torch.testing.assert_close(found["sparse_weights"], weights.masked_fill(special, 0), rtol=1e-3, atol=1e-4)
        vectors = F.normalize(F.linear(states[:, 1:], **colbert), dim=-1) * mask[:, 1:, None]
        torch.testing.assert_close(found["colbert_vecs"], vectors, rtol=1e-3, atol=1e-4)


@pytest.fixture
def without_graphs(monkeypatch):
    """No graph is made; the cosine that it would have can be set."""
    cosines = {onnx_graph.FLOAT: 1.0}
    monkeypatch.setattr(onnx_graph, "refuse_missing", lambda to: None)
    monkeypatch.setattr(onnx_graph, "_write_graph", lambda graph, encoder, path: path.write_bytes(b"graph"))
    monkeypatch.setattr(onnx_graph, "graph_embeddings", lambda path, *_: f"onnx/{path.name}")
    monkeypatch.setattr(onnx_graph, "_cosine", lambda name, _: cosines[name])
    return cosines


def test_the_folder_has_what_other_tools_look_for(tmp_path, without_graphs, capsys):
    make("xlm-roberta", tmp_path / "model", MoEConfig(2, router="given"))
    folder = tmp_path / "out"
    main([str(tmp_path / "model"), str(folder), "--to", "onnx"])
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "xlm-roberta"
    assert not {"auto_map", "moe"} & set(config)
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer_config["model_max_length"] == 100
    assert tokenizer_config["pad_token"] == json.loads((folder / "special_tokens_map.json").read_text())["pad_token"]
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).truncation is None
    assert (folder / "modules.json").is_file()
    assert not list(folder.glob("*.safetensors")) + list(folder.glob("*.py"))
    assert "onnx/model.onnx" in (folder / "README.md").read_text()
    assert "onnx/model.onnx: 0.0 MB, cosine with torch at least 1.000000\n" in capsys.readouterr().out
    export(input=tmp_path / "model", output=folder, to="onnx", overwrite=True)


@pytest.mark.parametrize("cosine", [0.9998, float("nan")])
def test_a_graph_that_computes_something_else_is_not_left(tmp_path, without_graphs, cosine):
    make("xlm-roberta", tmp_path / "model")
    without_graphs[onnx_graph.FLOAT] = cosine
    with pytest.raises(
        UserError, match=rf"onnx/model.onnx: .* the cosine {cosine:.6f} with torch's, expected more than"
    ):
        export(input=tmp_path / "model", output=tmp_path / "out", to="onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_that_can_be_no_graph_is_named(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("step 1/3 failed") from ValueError("found a size that data decide")

    make("xlm-roberta", tmp_path / "model")
    monkeypatch.setattr(onnx_graph, "refuse_missing", lambda to: None)
    monkeypatch.setattr("torch.onnx.export", fail)
    with pytest.raises(UserError, match=r"no graph of XLMRobertaModel \(ValueError: found a size that data decide\)"):
        export(input=tmp_path / "model", output=tmp_path / "out", to="onnx")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_a_missing_library_is_named_before_the_work(tmp_path, monkeypatch, to):
    def without(name):
        raise ModuleNotFoundError(f"No module named '{name}'")

    monkeypatch.setattr("importlib.import_module", without)
    with pytest.raises(UserError, match=rf"to {to}: No module named '.*'; pip install \"clpl-moe\[{to}\]\""):
        export(input="no such model", output=tmp_path / "out", to=to)
