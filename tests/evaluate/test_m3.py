import importlib
import shutil

import pytest
import torch

from clpl_moe.common.errors import UserError
from clpl_moe.encoder import load_encoder
from clpl_moe.evaluate import m3
from clpl_moe.evaluate.m3 import combine, load_heads, rerank, score_candidates
from clpl_moe.retrieval.collection import Collection
from clpl_moe.retrieval.options import EncodingArguments, open_encoder

QUERIES = ["red house", "aa a aab", "서울 house", "x"]
PASSAGES = [
    "a red house on a hill",
    "aaa aa",
    "서울 의 집",
    "x",
    "",
    "a much longer passage about houses, red and blue ones",
]


@pytest.fixture
def encoding():
    return EncodingArguments(query_max_len=40, passage_max_len=40, dtype="float32", batch_tokens=70)


def save_m3(encoder, tokenizer, folder, seed=0, width=32):
    """A folder as FlagEmbedding writes it, with heads."""
    encoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    torch.save(torch.nn.Linear(32, 1).state_dict(), folder / "sparse_linear.pt")
    torch.save(torch.nn.Linear(32, width).state_dict(), folder / "colbert_linear.pt")
    return folder


@pytest.mark.parametrize(("batch_size", "weights"), [(1, (1.0, 0.3, 1.0)), (24, (0.15, 0.5, 0.35))])
def test_equals_flag_embedding(tiny_encoder, encoding, batch_size, weights):
    importlib.import_module("clpl_moe.data.flag_embedding")  # transformers 5.24: not to be imported by itself
    from FlagEmbedding import BGEM3FlagModel

    reference = BGEM3FlagModel(str(tiny_encoder), use_fp16=False, devices="cpu")
    pairs = [(query, passage) for query in QUERIES for passage in PASSAGES]
    expected = reference.compute_score(
        pairs,
        batch_size=batch_size,
        max_query_length=40,
        max_passage_length=40,
        weights_for_different_modes=list(weights),
    )
    encoder = open_encoder(str(tiny_encoder), encoding)
    heads = load_heads(tiny_encoder, 32)
    candidates = [list(range(len(PASSAGES)))] * len(QUERIES)
    scores = torch.cat(score_candidates(encoder, heads, QUERIES, PASSAGES, candidates, encoding))
    names = {"dense": "dense", "sparse": "sparse", "multi-vec": "colbert"}
    names |= {"dense+sparse": "sparse+dense", "all": "colbert+sparse+dense"}
    found = {"dense": scores[:, 0], **combine(scores, weights)}
    for kind, values in found.items():
        torch.testing.assert_close(
            values, torch.tensor(expected[names[kind]]), atol=1e-5, rtol=0, msg=lambda m, k=kind: f"{k}: {m}"
        )
    # Not all the same, and the sparse ones neither all 0 nor of all pairs.
    assert all(values.std() > 0.01 for values in found.values())
    assert 0 < (found["sparse"] == 0).sum() < len(pairs)


def test_scores_by_hand(tiny_encoder, encoding):
    """From the definition, a token at a time."""
    encoder = open_encoder(str(tiny_encoder), encoding)
    heads = load_heads(tiny_encoder, 32)
    states = {}
    for text in ("aab", "ba c"):
        batch = encoder.tokenizer([text], return_tensors="pt").to(encoder.model.device)
        with torch.no_grad():
            states[text] = (batch["input_ids"][0].tolist(), encoder.model(**batch).last_hidden_state[0].cpu())

    def lexical(text):
        ids, hidden = states[text]
        weights = {}
        for i, w in zip(ids[1:-1], torch.relu(heads.sparse(hidden[1:-1])).flatten().tolist()):
            weights[i] = max(weights.get(i, 0), w)
        return weights

    def vectors(text):
        return torch.nn.functional.normalize(heads.multi_vector(states[text][1][1:]), dim=-1)

    first, second = lexical("aab"), lexical("ba c")
    sparse = sum(first[i] * second[i] for i in first.keys() & second.keys())
    multi = (vectors("aab") @ vectors("ba c").T).max(1).values.mean().item()
    ((found,),) = score_candidates(encoder, heads, ["aab"], ["ba c"], [[0]], encoding)
    assert found[1].item() == pytest.approx(sparse, abs=1e-6)
    assert found[2].item() == pytest.approx(multi, abs=1e-6)


def test_blocks_batches_and_candidates_do_not_change_a_score(tiny_encoder, encoding, monkeypatch):
    encoder = open_encoder(str(tiny_encoder), encoding)
    heads = load_heads(tiny_encoder, 32)
    queries, passages = [*QUERIES, QUERIES[0]], [*PASSAGES, PASSAGES[0]]
    everything = [list(range(len(passages)))] * len(queries)
    full = score_candidates(encoder, heads, queries, passages, everything, encoding)
    torch.testing.assert_close(full[0], full[-1], atol=1e-6, rtol=0)
    assert all(torch.equal(own[0], own[-1]) for own in full)  # equal texts
    monkeypatch.setattr(m3, "_QUERIES_AT_ONCE", 2)
    some = [[5, 0], [], [6, 2, 4], [3], [1]]
    tight = EncodingArguments(40, 40, batch_tokens=1, dtype="float32")
    found = score_candidates(encoder, heads, queries, passages, some, tight)
    for own, places, complete in zip(found, some, full):
        torch.testing.assert_close(own, complete[places], atol=1e-6, rtol=0)


def test_memory_holds_one_batch(tiny_encoder, encoding, monkeypatch):
    """Each candidate is encoded once, no more at a time than the budget of tokens, and others not at all."""
    encoder = open_encoder(str(tiny_encoder), encoding)
    heads = load_heads(tiny_encoder, 32)
    shapes = []
    whole = m3._embed_tokens

    def counted(*arguments):
        tokens = whole(*arguments)
        shapes.append(tuple(tokens.ids.shape))
        return tokens

    monkeypatch.setattr(m3, "_embed_tokens", counted)
    passages = [f"passage {i:03}" for i in range(90)]
    candidates = [[i, i + 1, 50] for i in range(30)]
    queries = [f"q{i:02}" for i in range(30)]
    score_candidates(encoder, heads, queries, passages, candidates, encoding)
    assert sum(n for n, _ in shapes) == 30 + 32
    assert max(n * length for n, length in shapes) <= 70


def test_rerank_maps_ids_and_texts(tiny_encoder, encoding, tmp_path):
    collection = Collection(
        tmp_path, "ko", "dev", [f"p{i}" for i in range(len(PASSAGES))], PASSAGES, ["q0", "q1"], QUERIES[:2], {}
    )
    encoder = open_encoder(str(tiny_encoder), encoding)
    heads = load_heads(tiny_encoder, 32)
    runs = rerank(encoder, heads, collection, {"q1": ["p3", "p0"], "q0": ["p1"]}, encoding)
    expected = score_candidates(encoder, heads, [QUERIES[1]], PASSAGES, [[3, 0]], encoding)[0]
    assert list(runs) == ["sparse", "multi-vec", "dense+sparse", "all"]
    for kind, values in combine(expected).items():
        assert list(runs[kind]) == ["q1", "q0"]
        assert runs[kind]["q1"] == {"p3": pytest.approx(values[0].item()), "p0": pytest.approx(values[1].item())}


def test_experts_and_their_padding(encoding, tiny_tokenizer, tmp_path):
    """Scores of a folder with experts, whose padded batches must not differ from single texts."""
    from clpl_moe import MoEConfig, inject_moe
    from clpl_moe.encoder import save_encoder
    from helpers.tiny import make_encoder, perturb_experts

    model = make_encoder(vocab_size=len(tiny_tokenizer), max_position_embeddings=130)
    model = inject_moe(model, MoEConfig(num_experts=3))
    perturb_experts(model)
    save_encoder(model, tiny_tokenizer, tmp_path / "moe")
    encoder = open_encoder(str(tmp_path / "moe"), encoding)
    torch.manual_seed(0)
    heads = m3.M3Heads(torch.nn.Linear(32, 1), torch.nn.Linear(32, 16))
    everything = [list(range(len(PASSAGES)))] * len(QUERIES)
    wide, single = (
        score_candidates(encoder, heads, QUERIES, PASSAGES, everything, options)
        for options in (EncodingArguments(40, 40, 1000), EncodingArguments(40, 40, 1))
    )
    torch.testing.assert_close(wide, single, atol=1e-5, rtol=0)


def test_heads(tiny_encoder, tmp_path):
    assert (
        load_heads(tiny_encoder, 32).fingerprint()
        == load_heads(shutil.copytree(tiny_encoder, tmp_path / "b"), 32).fingerprint()
    )
    model, tokenizer = load_encoder(tiny_encoder)
    folder = save_m3(model, tokenizer, tmp_path / "m3", seed=1, width=8)
    heads = load_heads(folder, 32)
    assert heads.multi_vector.out_features == 8
    assert heads.fingerprint() != load_heads(tiny_encoder, 32).fingerprint()
    with pytest.raises(UserError, match=r"sparse_linear\.pt: found a head for states of width 32, the model's are 64"):
        load_heads(folder, 64)
    for content in ({"weight": torch.ones(32), "bias": torch.ones(32)}, {"weight": torch.ones(8, 32)}, [1]):
        torch.save(content, folder / "colbert_linear.pt")
        with pytest.raises(UserError, match=r"colbert_linear\.pt: not a head"):
            load_heads(folder, 32)
    torch.save({"weight": torch.full((32, 32), torch.nan), "bias": torch.zeros(32)}, folder / "colbert_linear.pt")
    with pytest.raises(UserError, match=r"colbert_linear\.pt: holds NaN"):
        load_heads(folder, 32)
    (folder / "colbert_linear.pt").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"colbert_linear\.pt: the head cannot be read"):
        load_heads(folder, 32)
    (folder / "colbert_linear.pt").unlink()
    assert load_heads(folder, 32) is None
