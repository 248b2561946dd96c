import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

from clpl_moe import Encoder, MoEConfig, inject_moe, load_encoder, merge_experts, save_encoder
from clpl_moe.common.errors import UserError
from clpl_moe.encoder.settings import EmbeddingSettings, pool, read_settings
from helpers.tiny import make_encoder, perturb_experts

TEXTS = [
    "한글은 세종대왕이 만들었다",
    "تهران پایتخت ایران است و می‌گویند بزرگ است",
    "दिल्ली भारत की राजधानी है",
    "a",
    "A longer passage of several words, and of punctuation.",
]

# What a user's process does with folders where clpl_moe cannot be imported; it stores what loaders compute.
LOADERS = """
import importlib.util, json, sys, types

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "clpl_moe":
            raise ImportError(name)

sys.meta_path.insert(0, Blocker())
folders, texts, output = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
import torch
import transformers
# FlagEmbedding 1.4.2 cannot be imported with transformers 5.24, whose rerankers' module is gone.
removed = "transformers.modeling_attn_mask_utils"
if importlib.util.find_spec(removed) is None:
    sys.modules[removed] = types.ModuleType(removed)
    for name in ("AttentionMaskConverter", "_prepare_4d_attention_mask", "_prepare_4d_causal_attention_mask",
                 "_prepare_4d_causal_attention_mask_for_sdpa"):
        setattr(sys.modules[removed], name, lambda *_: None)
from FlagEmbedding import BGEM3FlagModel
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer, XLMRobertaModel

def refused(load):
    try:
        load()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

results = {}
for pooling, folder in folders.items():
    found = results[pooling] = {}
    tokens = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    auto = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        found["AutoModel"] = auto(**tokens).last_hidden_state
    found["mask"] = tokens["attention_mask"]
    flag = BGEM3FlagModel(
        folder, trust_remote_code=True, use_fp16=False, devices="cpu", pooling_method=pooling
    )
    encoded = flag.encode(texts, return_dense=True, return_sparse=True, return_colbert_vecs=True)
    found["BGEM3FlagModel"] = torch.from_numpy(encoded["dense_vecs"])
    found["sparse_linear"] = flag.model.sparse_linear.state_dict()
    found["colbert_linear"] = flag.model.colbert_linear.state_dict()
    sentence = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
    found["SentenceTransformer"] = torch.from_numpy(sentence.encode(texts))
    found["max_seq_length"] = sentence.max_seq_length
    found["refused"] = {
        "AutoModel": refused(lambda: AutoModel.from_pretrained(folder)),
        "XLMRobertaModel": refused(lambda: XLMRobertaModel.from_pretrained(folder)),
        "BGEM3FlagModel": refused(lambda: BGEM3FlagModel(folder, use_fp16=False, devices="cpu")),
        "SentenceTransformer": refused(lambda: SentenceTransformer(folder, device="cpu")),
    }
torch.save(results, output)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_encoder):
    """Saved encoders with experts by their pooling."""
    saved = {}
    for pooling, target in (("cls", "intermediate"), ("mean", "ffn")):
        encoder, tokenizer = load_encoder(tiny_encoder)
        inject_moe(encoder, MoEConfig(num_experts=3, top_k=2, target=target, layers=[1]))
        perturb_experts(encoder)
        saved[pooling] = tmp_path_factory.mktemp("saved") / pooling
        settings = EmbeddingSettings(pooling=pooling)
        save_encoder(encoder, tokenizer, saved[pooling], settings, max_length=100, heads_from=tiny_encoder)
    return saved


@pytest.fixture(scope="module")
def by_loader(folders, tmp_path_factory):
    """What other tools make of the folders in a process that cannot import this package."""
    folder = tmp_path_factory.mktemp("loaders")
    arguments = [
        json.dumps({k: str(v) for k, v in folders.items()}),
        json.dumps(TEXTS),
        folder / "results.pt",
    ]
    run = subprocess.run(
        [sys.executable, "-c", LOADERS, *map(str, arguments)],
        env={**os.environ, "HF_MODULES_CACHE": str(folder / "modules")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return torch.load(folder / "results.pt", weights_only=False)


def states_and_embeddings(folder, texts=TEXTS):
    """Token states and embeddings as this package computes them."""
    encoder, tokenizer = load_encoder(folder)
    settings = read_settings(folder)
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = encoder(**tokens).last_hidden_state
    return states, F.normalize(pool(states, tokens["attention_mask"], settings.pooling), dim=1)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_every_loader_gives_the_same_embeddings(folders, by_loader, pooling):
    states, embeddings = states_and_embeddings(folders[pooling])
    found = by_loader[pooling]
    assert read_settings(folders[pooling]).pooling == pooling
    mask = found["mask"].bool()
    torch.testing.assert_close(found["AutoModel"][mask], states[mask], rtol=0, atol=1e-5)
    for loader in ("BGEM3FlagModel", "SentenceTransformer"):
        cosines = F.cosine_similarity(found[loader].float(), embeddings)
        assert (cosines > 0.99999).all(), (loader, cosines)
    assert found["max_seq_length"] == 100
    apart = embeddings @ embeddings.T
    assert apart.fill_diagonal_(0).max() < 0.999  # the texts differ, so that equality says something


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_loaders_that_do_not_know_the_experts_fail(by_loader, pooling):
    refused = by_loader[pooling]["refused"]
    assert "trust_remote_code" in refused["AutoModel"]
    assert refused["XLMRobertaModel"].startswith("RuntimeError")
    assert "trust_remote_code" in refused["BGEM3FlagModel"]
    assert "trust_remote_code" in refused["SentenceTransformer"]


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_heads_of_the_base_model_survive(by_loader, tiny_encoder, pooling):
    for head in ("sparse_linear", "colbert_linear"):
        expected = torch.load(tiny_encoder / f"{head}.pt")
        found = by_loader[pooling][head]
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_without_remote_code_in_a_process_that_imports_the_package(folders):
    for folder in folders.values():
        loaded = transformers.AutoModel.from_pretrained(folder).eval()
        assert type(loaded).__module__ == "clpl_moe.moe.modeling_clpl_moe"
        tokens = transformers.AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
        with torch.no_grad():
            states = loaded(**tokens).last_hidden_state
        torch.testing.assert_close(states, states_and_embeddings(folder)[0])


def test_with_remote_code_in_a_process_that_imports_the_package(folders, tmp_path):
    """The folder's own code and this package's stand side by side, and what was loaded can be saved again."""
    folder = folders["cls"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    loaded = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    tokens = tokenizer(TEXTS, padding=True, return_tensors="pt")
    expected = states_and_embeddings(folder)[0]
    torch.testing.assert_close(loaded(**tokens).last_hidden_state, expected)
    loaded.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    torch.testing.assert_close(states_and_embeddings(tmp_path)[0], expected)


def test_heads_that_were_trained_are_written_instead(tmp_path, tiny_encoder):
    encoder, tokenizer = load_encoder(tiny_encoder)
    trained = {"sparse_linear.pt": torch.nn.Linear(32, 1).state_dict()}
    save_encoder(encoder, tokenizer, tmp_path, heads=trained, heads_from=tiny_encoder)
    sparse, colbert = torch.load(tmp_path / "sparse_linear.pt"), torch.load(tmp_path / "colbert_linear.pt")
    assert torch.equal(sparse["weight"], trained["sparse_linear.pt"]["weight"])
    assert torch.equal(colbert["weight"], torch.load(tiny_encoder / "colbert_linear.pt")["weight"])


def test_a_model_without_heads_gets_none(tmp_path, tiny_encoder):
    encoder, tokenizer = load_encoder(tiny_encoder)
    save_encoder(encoder, tokenizer, tmp_path / "one")
    save_encoder(encoder, tokenizer, tmp_path / "two", heads_from=tmp_path / "one")
    assert not list(tmp_path.glob("*/*_linear.pt"))


@pytest.mark.parametrize("error", ["LocalEntryNotFoundError", "RepositoryNotFoundError"])
def test_heads_are_never_lost_in_silence(tmp_path, tiny_encoder, monkeypatch, error):
    """Where the hub gives no answer nobody knows whether there are any."""
    from huggingface_hub import errors

    def download(*args, **kwargs):
        raise getattr(errors, error).__new__(getattr(errors, error))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    encoder, tokenizer = load_encoder(tiny_encoder)
    with pytest.raises(UserError, match="someone/bge-m3: .* cannot be told whether there are sparse"):
        save_encoder(encoder, tokenizer, tmp_path / "out", heads_from="someone/bge-m3")
    assert not (tmp_path / "out").exists()
    # All are given: there is nothing to ask for.
    heads = {name: torch.load(tiny_encoder / name) for name in ("sparse_linear.pt", "colbert_linear.pt")}
    save_encoder(encoder, tokenizer, tmp_path / "out", heads=heads, heads_from="someone/bge-m3")


def test_a_folder_can_be_saved_onto_itself(tmp_path, tiny_encoder):
    encoder, tokenizer = load_encoder(tiny_encoder)
    save_encoder(encoder, tokenizer, tmp_path, heads_from=tiny_encoder)
    before = (tmp_path / "sparse_linear.pt").read_bytes()
    save_encoder(encoder, tokenizer, tmp_path, heads_from=tmp_path)
    assert (tmp_path / "sparse_linear.pt").read_bytes() == before


def test_settings_come_back(tmp_path, tiny_encoder):
    encoder, tokenizer = load_encoder(tiny_encoder)
    settings = EmbeddingSettings("mean", query_prompt="query: ", passage_prompt="passage: ")
    save_encoder(encoder, tokenizer, tmp_path, settings)
    assert read_settings(tmp_path) == settings


@pytest.mark.parametrize("merge", [False, True])
def test_a_dense_encoder_needs_no_code(tmp_path, tiny_encoder, merge):
    encoder, tokenizer = load_encoder(tiny_encoder)
    if merge:
        inject_moe(encoder, MoEConfig())
        save_encoder(encoder, tokenizer, tmp_path / "moe")
        merge_experts(encoder)
    save_encoder(encoder, tokenizer, tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert config["model_type"] == "xlm-roberta"
    assert not {"auto_map", "moe"} & config.keys()
    assert not list((tmp_path / "dense").glob("*.py"))
    expected, _ = states_and_embeddings(tiny_encoder)
    torch.testing.assert_close(states_and_embeddings(tmp_path / "dense")[0], expected)


def test_weights_can_be_given(tmp_path, tiny_encoder):
    encoder, tokenizer = load_encoder(tiny_encoder)
    inject_moe(encoder, MoEConfig())
    other = {name: value + 1 for name, value in encoder.state_dict().items()}
    save_encoder(encoder, tokenizer, tmp_path, state_dict=other)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == other.keys()
    assert all(torch.equal(saved[name], other[name]) for name in other)


def test_refuses_experts_in_a_class_that_could_not_be_loaded_again(tmp_path, tiny_tokenizer):
    skipped = ("model_type", "architectures", "dtype")
    values = {k: v for k, v in make_encoder().config.to_dict().items() if k not in skipped}
    model = inject_moe(transformers.CamembertModel(transformers.CamembertConfig(**values)), MoEConfig())
    with pytest.raises(ValueError, match=r"a CamembertModel with experts could not be loaded again: merge_experts"):
        save_encoder(model, tiny_tokenizer, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_an_encoder_that_was_loaded_before_the_package_is_refused(folders, tmp_path):
    """Its experts are of classes that this package does not know."""
    code = """
import sys
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
from clpl_moe import merge_experts
from clpl_moe.encoder.encoder import save_encoder
from clpl_moe.moe.inject import expert_parameters
for function in (merge_experts, expert_parameters, lambda model: save_encoder(model, None, sys.argv[1], None)):
    try:
        function(model)
    except ValueError as error:
        print(error)
"""
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", code, str(folders["cls"])]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.stdout.count("loaded with the code in its folder: use clpl_moe.load_encoder") == 3, run.stderr[-2000:]


def test_every_file_has_the_permissions_that_the_umask_leaves(tiny_encoder, tmp_path):
    """safetensors keeps its files to their owner."""
    before = os.umask(0o027)
    try:
        save_encoder(*load_encoder(tiny_encoder), tmp_path / "saved", heads_from=tiny_encoder)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "saved").rglob("*") if path.is_file()} == {0o640}


def test_the_tokenizer_is_saved_without_the_truncation_of_its_last_call(tiny_encoder, tmp_path):
    """Tools that read tokenizer.json by itself would cut every text."""
    encoder = Encoder.load(tiny_encoder, device="cpu")
    encoder.encode_queries(["red house"], max_length=5)
    encoder.save(tmp_path / "first")
    damaged = tmp_path / "first/tokenizer_config.json"  # as folders have it that were written like that
    damaged.write_text(json.dumps(json.loads(damaged.read_text()) | {"max_length": 5, "stride": 0}))
    Encoder.load(tmp_path / "first", device="cpu").save(tmp_path / "second")
    for folder in (tmp_path / "first", tmp_path / "second"):
        described = json.loads((folder / "tokenizer.json").read_text())
        assert described["truncation"] is None
        assert described["padding"] is None
    assert "max_length" not in json.loads((tmp_path / "second/tokenizer_config.json").read_text())
