"""A trimmed vocabulary: the same pieces and embeddings for covered text, smaller pieces for other text, and it loads everywhere."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from transformers import AutoModel, AutoTokenizer

from clpl_moe import Encoder, MoEConfig, UserError, inject_moe
from clpl_moe.encoder.settings import EmbeddingSettings
from clpl_moe.export import export
from clpl_moe.export.vocabulary import trim_vocabulary
from helpers.tiny import make_encoder, perturb_experts
from helpers.trained_tokenizers import COVERED, OTHER, train_tokenizer

KINDS = ["xlm-roberta", "bert"]
SETTINGS = EmbeddingSettings("mean", True, "query: ", "passage: ")


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return request.param, train_tokenizer(request.param)


def make(tokenizer, spare=5):
    kind, tokenizer = tokenizer
    sizes = {"vocab_size": len(tokenizer) + spare, "max_position_embeddings": 130}
    numbers = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    return Encoder(make_encoder(kind, **sizes, **numbers), tokenizer, SETTINGS)


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "corpus.txt").write_text("\n".join(COVERED), encoding="utf-8")
    return tmp_path / "corpus.txt"


@pytest.mark.parametrize("experts", [False, True])
def test_covered_text_has_the_same_embedding_to_the_last_digit(tokenizer, corpus, tmp_path, experts):
    encoder = make(tokenizer)
    if experts:
        perturb_experts(inject_moe(encoder, MoEConfig(num_experts=3)).model)
    heads = {"sparse_linear.pt": {"weight": torch.ones(1, 32), "bias": torch.ones(1)}}
    encoder.save(tmp_path / "before", heads=heads)
    found = export(input=tmp_path / "before", output=tmp_path / "after", trim_vocab=[corpus])
    before, after = Encoder.load(tmp_path / "before", device="cpu"), Encoder.load(tmp_path / "after", device="cpu")
    for name in ("encode_queries", "encode_passages"):
        assert torch.equal(getattr(before, name)(COVERED), getattr(after, name)(COVERED))
    for text in COVERED:
        assert after.tokenizer.tokenize(text) == before.tokenizer.tokenize(text)
    rows = after.model.embeddings.word_embeddings.weight
    assert found.pieces == (len(before.tokenizer) + 5, len(rows))
    assert len(rows) == len(after.tokenizer) == after.model.config.vocab_size < len(before.tokenizer)
    assert after.settings == before.settings
    assert after.head_files.keys() == {"sparse_linear.pt"}


def test_the_folder_loads_everywhere(tokenizer, corpus, tmp_path):
    make(tokenizer).save(tmp_path / "before")
    folder = tmp_path / "after"
    export(input=tmp_path / "before", output=folder, trim_vocab=[corpus])
    expected = Encoder.load(folder, device="cpu", compute_dtype=torch.float32).encode_queries(COVERED)
    found = SentenceTransformer(str(folder), device="cpu").encode_query(COVERED, convert_to_tensor=True)
    torch.testing.assert_close(found, expected)
    loaded, own = AutoTokenizer.from_pretrained(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = AutoModel.from_pretrained(folder)
    for text in COVERED + OTHER:
        assert own.encode(text).ids == loaded(text)["input_ids"]
        assert max(own.encode(text).ids) < model.config.vocab_size
    for name in ("pad", "bos", "eos"):
        assert getattr(model.config, f"{name}_token_id") == getattr(loaded, f"{name}_token_id")
    assert (
        model.embeddings.word_embeddings.padding_idx
        == loaded.pad_token_id
        == train_tokenizer(tokenizer[0]).pad_token_id
    )


def test_other_text_falls_into_smaller_pieces(tokenizer):
    encoder = make(tokenizer)
    before = encoder.tokenizer
    trim_vocabulary(encoder, COVERED)
    numbers = [[len(some.tokenize(text)) for text in OTHER] for some in (encoder.tokenizer, before)]
    assert sum(numbers[0]) > sum(numbers[1])
    for text in OTHER:
        more, fewer = (some.tokenize(text) for some in (encoder.tokenizer, before))
        assert len(more) >= len(fewer)
        assert before.unk_token not in more
        assert before.convert_tokens_to_string(more) == before.convert_tokens_to_string(fewer)


def test_no_text_keeps_no_pieces(tokenizer):
    with pytest.raises(UserError, match="trim_vocab: found no text"):
        trim_vocabulary(make(tokenizer), [])


WORDS = [word for text in COVERED + OTHER for word in text.split()]
TEXTS = st.lists(st.one_of(st.sampled_from(WORDS), st.text("abdehorst서울은ं।é☂ ", max_size=9)), max_size=6).map(
    " ".join
)


@given(covered=st.lists(TEXTS, min_size=1, max_size=5), kind=st.sampled_from(KINDS))
@settings(max_examples=25, deadline=None)
def test_any_covered_text_keeps_its_pieces(covered, kind):
    """Also texts with words that the tokenizer does not know."""
    encoder = make((kind, train_tokenizer(kind)))
    before = encoder.tokenizer
    trim_vocabulary(encoder, covered)
    for text in covered:
        assert encoder.tokenizer.tokenize("query: " + text) == before.tokenize("query: " + text)


def test_a_collection_and_compressed_lines_are_read(tokenizer, tmp_path):
    import gzip

    (tmp_path / "ko").mkdir()
    lines = [{"id": "zzqq", "title": COVERED[0], "text": COVERED[1]}]
    (tmp_path / "ko/corpus.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with gzip.open(tmp_path / "ko/more.jsonl.gz", "wt") as file:
        file.write(json.dumps({"query": COVERED[2], "pos": [COVERED[3]], "neg": None}))
    make(tokenizer).save(tmp_path / "before")
    export(input=tmp_path / "before", output=tmp_path / "after", trim_vocab=[tmp_path / "ko"])
    before, after = Encoder.load(tmp_path / "before", device="cpu"), Encoder.load(tmp_path / "after", device="cpu")
    texts = [f"{COVERED[0]} {COVERED[1]}", *COVERED]
    assert torch.equal(before.encode_passages(texts), after.encode_passages(texts))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("none.txt", None, "no such file or folder"),
        ("a.csv", b"a,b", "a file of another kind, expected .jsonl or .txt"),
        ("a.txt", b"good\n\xff\n", "a.txt:2: the line is not UTF-8"),
        ("a.jsonl", b'{"text": ', "a.jsonl:1: not JSON"),
    ],
)
def test_faults_of_the_corpus_are_named_and_nothing_is_written(tokenizer, tmp_path, file, content, message):
    if content is not None:
        (tmp_path / file).write_bytes(content)
    make(tokenizer).save(tmp_path / "before")
    with pytest.raises(UserError, match=message):
        export(input=tmp_path / "before", output=tmp_path / "after", trim_vocab=[tmp_path / file])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({"before", *([file] if content else [])})


def test_tokenizers_of_other_kinds_are_refused(tiny_encoder, corpus, tmp_path):
    with pytest.raises(UserError, match=r"trim_vocab: found a tokenizer of the kind WordLevel, expected Unigram"):
        export(input=tiny_encoder, output=tmp_path / "after", trim_vocab=[corpus])
    assert not (tmp_path / "after").exists()
