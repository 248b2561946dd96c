import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer

import clpl_moe
from clpl_moe import Encoder, MoEConfig, UserError, inject_moe, load_encoder, merge_experts, save_encoder
from clpl_moe.encoder.packing import PackedTexts
from clpl_moe.encoder.settings import EmbeddingSettings, read_settings, write_settings
from helpers.tiny import make_encoder, perturb_experts

TEXTS = ["한국어 문장", "a", "متن فارسی", "a longer sentence than the others, so that it is cut " * 2, "", "a"]
SETTINGS = EmbeddingSettings("mean", query_prompt="query: ", passage_prompt="passage: ")
# What sentence-transformers reads besides weights and tokenizer.
SETTINGS_FILES = (
    "modules.json",
    "1_Pooling/config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_encoder):
    """An encoder with mean pooling, prompts, and a limit of 60 tokens where its tokenizer and positions allow 128."""
    folder = tmp_path_factory.mktemp("encoders") / "mean"
    model, tokenizer = load_encoder(tiny_encoder)
    save_encoder(model, tokenizer, folder, SETTINGS, max_length=60, heads_from=tiny_encoder)
    return folder


@pytest.fixture
def encoder(folder):
    return Encoder.load(folder, compute_dtype=torch.float32, device="cpu")


def json_files(folder):
    return {name: json.loads((Path(folder) / name).read_text()) for name in SETTINGS_FILES}


def test_holds_what_the_folder_states(encoder, tiny_encoder):
    assert encoder.settings == SETTINGS
    assert encoder.max_length == 60
    assert not encoder.model.training
    assert encoder.dtype == torch.float32
    plain = Encoder.load(tiny_encoder, device="cpu")
    assert plain.settings == EmbeddingSettings()
    assert plain.max_length == 128
    assert clpl_moe.Encoder is Encoder


def test_a_length_beyond_the_positions_is_cut(folder, tiny_encoder, tmp_path):
    model, tokenizer = load_encoder(tiny_encoder)
    save_encoder(model, tokenizer, tmp_path, max_length=60)
    write_settings(tmp_path, SETTINGS, max_length=130, hidden_size=32)
    assert Encoder.load(tmp_path, device="cpu").max_length == 128


def test_encodes_as_sentence_transformers(encoder, folder):
    theirs = SentenceTransformer(str(folder), device="cpu")
    assert theirs.max_seq_length == 60
    for ours, kind in ((encoder.encode_queries, "query"), (encoder.encode_passages, "document")):
        expected = theirs.encode(TEXTS, prompt_name=kind, convert_to_tensor=True)
        embeddings = ours(TEXTS, progress=False)
        assert embeddings.dtype == torch.float32
        torch.testing.assert_close(embeddings, expected, atol=1e-5, rtol=0)
    assert (encoder.encode_queries(TEXTS) - encoder.encode_passages(TEXTS)).abs().max() > 1e-3


def test_truncated_embeddings(encoder, folder, tmp_path):
    whole = encoder.encode_passages(TEXTS, progress=False)
    truncated = Encoder.load(folder, compute_dtype=torch.float32, device="cpu", truncate_dim=8)
    assert (encoder.dimensions, truncated.dimensions) == (32, 8)
    found = truncated.encode_passages(TEXTS, progress=False)
    torch.testing.assert_close(found, F.normalize(whole[:, :8], dim=-1))
    for batch in ((TEXTS, "passage"), (truncated.tokenizer(["passage: a"], return_tensors="pt"),)):
        embeddings = truncated.embed(*batch)
        torch.testing.assert_close(embeddings.detach(), found[1:2] if len(batch) == 1 else found)
    truncated.save(tmp_path)
    again = Encoder.load(tmp_path, compute_dtype=torch.float32, device="cpu")
    assert again.settings == truncated.settings
    theirs = SentenceTransformer(str(tmp_path), device="cpu")
    options = {"prompt_name": "document", "normalize_embeddings": True, "convert_to_tensor": True}
    torch.testing.assert_close(found, theirs.encode(TEXTS, **options), atol=1e-5, rtol=0)
    assert not truncated.encode_passages([], progress=False).numel()
    with pytest.raises(UserError, match="truncate_dim: found 33, expected 1 to 32, the model's dimensions"):
        Encoder.load(folder, truncate_dim=33)


def test_broken_weights_are_refused(encoder):
    with torch.no_grad():
        encoder.model.embeddings.word_embeddings.weight[:] = float("nan")
    with pytest.raises(UserError, match="NaN or infinite embeddings"):
        encoder.encode_queries(["x"])


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", ["query", "passage"])
def test_every_form_of_a_batch_gives_the_same_embeddings_with_gradients(encoder, kind, normalize):
    encoder.settings = EmbeddingSettings("mean", normalize, "query: ", "passage: ")
    encode = encoder.encode_queries if kind == "query" else encoder.encode_passages
    expected = encode(TEXTS, max_length=30, progress=False)
    prompted = [f"{kind}: {text}" for text in TEXTS]
    features = encoder.tokenizer(prompted, truncation=True, max_length=30, padding=True, return_tensors="pt")
    packed = PackedTexts.from_sequences(encoder.tokenizer(prompted, truncation=True, max_length=30)["input_ids"])
    gradients = []
    for batch in ((TEXTS, kind), (features,), (packed,)):
        encoder.model.zero_grad()
        embeddings = encoder.embed(*batch, max_length=30)
        torch.testing.assert_close(embeddings.detach(), expected, atol=1e-5, rtol=0)
        embeddings[:, 0].sum().backward()
        gradients.append(encoder.model.embeddings.word_embeddings.weight.grad.clone())
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(gradients[2], gradients[0], atol=1e-5, rtol=1e-4)


def test_embedding_texts_needs_their_kind(encoder):
    with pytest.raises(ValueError, match="'query' or 'passage'"):
        encoder.embed(TEXTS)
    with pytest.raises(ValueError, match="found 'document'"):
        encoder.embed(TEXTS, "document")


def test_embedding_keeps_to_a_surrounding_autocast(encoder):
    exact = encoder.embed(TEXTS, "query")
    with torch.autocast("cpu", torch.bfloat16):
        half = encoder.embed(TEXTS, "query")
    assert half.dtype == torch.float32
    assert not torch.equal(half, exact)
    encoder.compute_dtype = torch.bfloat16
    assert torch.equal(encoder.embed(TEXTS, "query"), half)
    with torch.autocast("cpu", enabled=False):
        assert torch.equal(encoder.embed(TEXTS, "query"), half)


def test_modes_and_devices(encoder):
    assert encoder.train() is encoder
    assert encoder.model.training
    assert encoder.eval() is encoder
    assert not encoder.model.training
    assert encoder.to("cpu") is encoder
    assert encoder.device == torch.device("cpu")
    assert [id(p) for p in encoder.parameters()] == [id(p) for p in encoder.model.parameters()]


def test_experts_go_into_it_and_are_merged(encoder, tmp_path):
    before = encoder.encode_queries(TEXTS)
    assert inject_moe(encoder, MoEConfig(num_experts=3, top_k=2)) is encoder
    torch.testing.assert_close(encoder.encode_queries(TEXTS), before, atol=1e-5, rtol=0)
    perturb_experts(encoder.model)
    with_experts = encoder.encode_queries(TEXTS)
    assert (with_experts - before).abs().max() > 1e-3
    encoder.save(tmp_path)
    again = Encoder.load(tmp_path, compute_dtype=torch.float32)
    torch.testing.assert_close(again.encode_queries(TEXTS), with_experts)
    assert again.fingerprint() == encoder.fingerprint()
    assert merge_experts(encoder) is encoder
    assert encoder.model.config.model_type == "xlm-roberta"


@pytest.mark.parametrize("form", ["Encoder", "load_encoder"])
def test_loading_and_saving_keeps_settings_and_length(folder, tmp_path, form):
    if form == "Encoder":
        Encoder.load(folder).save(tmp_path)
    else:
        save_encoder(*load_encoder(folder), tmp_path)
    assert read_settings(tmp_path) == SETTINGS
    assert json_files(tmp_path) == json_files(folder)
    found, expected = (SentenceTransformer(str(place), device="cpu") for place in (tmp_path, folder))
    assert found.max_seq_length == expected.max_seq_length == 60
    for prompt in ("query", "document"):
        embeddings, wanted = (model.encode(TEXTS, prompt_name=prompt) for model in (found, expected))
        assert (embeddings == wanted).all()


def test_settings_are_kept_through_injection(folder, tmp_path):
    model, tokenizer = load_encoder(folder)
    save_encoder(inject_moe(model, MoEConfig()), tokenizer, tmp_path)
    assert json_files(tmp_path) == json_files(folder)


def test_saves_the_heads_it_was_loaded_with(folder, tmp_path):
    encoder = Encoder.load(folder)
    trained = torch.nn.Linear(32, 1).state_dict()
    encoder.save(tmp_path, heads={"sparse_linear.pt": trained})
    assert torch.equal(torch.load(tmp_path / "sparse_linear.pt")["weight"], trained["weight"])
    assert (tmp_path / "colbert_linear.pt").read_bytes() == (folder / "colbert_linear.pt").read_bytes()
    encoder.save(folder)  # onto itself


def test_heads_that_the_hub_did_not_tell_of_are_not_lost_in_silence(encoder, tmp_path, caplog):
    encoder.save(tmp_path / "known")
    assert not caplog.text
    encoder.head_files = None
    encoder.save(tmp_path / "unknown")
    assert "whether the model has sparse and multi-vector heads" in caplog.text


def test_settings_that_cannot_be_computed_stop_only_who_uses_them(folder, tmp_path, tiny_encoder):
    model, tokenizer = load_encoder(tiny_encoder)
    base = tmp_path / "base"
    save_encoder(model, tokenizer, base)
    modules = json.loads((base / "modules.json").read_text())
    (base / "modules.json").write_text(json.dumps([*modules, {"path": "3_Dense", "type": "a.b.Dense"}]))
    with pytest.raises(UserError, match="found a module 'Dense'"):
        Encoder.load(base)
    assert Encoder.load(base, settings=SETTINGS).settings == SETTINGS
    model, tokenizer = load_encoder(base)
    with pytest.raises(UserError, match="found a module 'Dense'"):
        save_encoder(model, tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    save_encoder(model, tokenizer, tmp_path / "out", SETTINGS)
    assert read_settings(tmp_path / "out") == SETTINGS


def test_models_of_another_origin_have_the_defaults(tiny_tokenizer):
    encoder = Encoder(make_encoder(vocab_size=len(tiny_tokenizer)), tiny_tokenizer)
    assert encoder.settings == EmbeddingSettings()
    assert encoder.max_length == 38
    assert "max_length=38" in repr(encoder)


def test_training_keeps_the_length_of_the_base(folder, tmp_path):
    """Through the command: the base takes 60 tokens, training cuts passages at 24."""
    data = tmp_path / "train.jsonl"
    data.write_text(json.dumps({"query": "q", "pos": ["p"], "neg": ["n"]}) + "\n")
    options = {"model_name_or_path": folder, "train_data": data, "output_dir": tmp_path / "run", "max_steps": 1}
    options |= {"query_max_len": 16, "passage_max_len": 24, "train_group_size": 2, "use_cpu": True, "fp16": False}
    argv = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "clpl_moe.train", *argv]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "Loading weights" not in run.stderr
    theirs = SentenceTransformer(str(tmp_path / "run"), device="cpu", trust_remote_code=True)
    assert theirs.max_seq_length == 60
    assert read_settings(tmp_path / "run") == SETTINGS
    embeddings = Encoder.load(tmp_path / "run").encode_passages(TEXTS)
    expected = theirs.encode(TEXTS, prompt_name="document", convert_to_tensor=True)
    assert F.cosine_similarity(embeddings, expected).min() > 0.999
