import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from clpl_moe.encoder import Encoder, cut
from clpl_moe.encoder.cut import cut_texts
from helpers.tiny import make_tokenizer

CORPUS = [
    "the red house by the river",
    "aaaa aa a aaab abab",
    "大韓民國首都東京都",
    "서울은 대한민국의 수도이다",
    "e\u0301a\u0308",
] * 20


def trained(kind):
    """Tokenizers that are built as XLM-R's, BERT's and RoBERTa's are."""
    if kind == "WordLevel":
        return make_tokenizer()
    tokenizer = Tokenizer(getattr(models, kind)())
    special = ["<pad>", "<unk>"]
    if kind == "Unigram":
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
        )
        trainer = trainers.UnigramTrainer(
            vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    elif kind == "WordPiece":
        tokenizer.model = models.WordPiece(unk_token="<unk>")
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


@pytest.fixture(scope="module", params=["Unigram", "WordPiece", "BPE", "WordLevel"])
def tokenizer(request):
    return trained(request.param)


def ids(tokenizer, texts, length):
    return tokenizer(texts, truncation=True, max_length=length)["input_ids"]


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    words=st.lists(
        st.sampled_from(["a", "aa", "ab", "red", "大", "國首", "서울", " ", "\n ", "e\u0301", "\x1c", "😀", "ﷺ"]),
        min_size=1,
    ),
    seed=st.integers(0, 9),
    length=st.integers(1, 40),
)
def test_first_tokens_of_a_cut_text_are_those_of_the_text(tokenizer, monkeypatch, words, seed, length):
    monkeypatch.setattr(cut, "_WORTH_IT", 100)
    monkeypatch.setattr(cut, "_CHARACTERS_A_TOKEN", 2)
    rng = random.Random(seed)
    text = "".join(rng.choice(words) for _ in range(6_000))
    (shorter,) = cut_texts(tokenizer, [text], length)
    assert text.startswith(shorter)
    assert ids(tokenizer, [shorter], length) == ids(tokenizer, [text], length)


@pytest.mark.parametrize("text", ["the red house ", "大韓民國首都"])
def test_a_text_of_megabytes_is_cut(tokenizer, text):
    long = text * 200_000
    (shorter,) = cut_texts(tokenizer, [long], 64)
    if "BPE" in tokenizer.backend_tokenizer.to_str()[-300_000:] and " " not in text:
        return
    assert len(shorter) < 10_000
    assert ids(tokenizer, [shorter], 64) == ids(tokenizer, [long[:100_000]], 64)
    assert cut_texts(tokenizer, [text], 64) == [text]


def test_a_run_of_one_letter_stays_whole_where_its_end_decides_its_beginning():
    """Pieces of equal score: which comes first depends on how many letters there are."""
    pieces = [("<unk>", 0.0), ("\u2581", -1.0), ("a", -10.0), ("aa", -1.0), ("aaa", -1.0)]
    model = Tokenizer(models.Unigram(pieces, unk_id=0))
    model.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>")
    for count in (100_000, 100_001, 100_002):
        (shorter,) = cut_texts(tokenizer, ["a" * count], 20)
        assert ids(tokenizer, [shorter], 20) == ids(tokenizer, ["a" * count], 20)


def test_a_tokenizer_that_cuts_on_the_left_gets_the_whole_text():
    tokenizer = make_tokenizer()
    tokenizer.truncation_side = "left"
    assert cut_texts(tokenizer, ["a b " * 50_000], 8) == ["a b " * 50_000]


def test_encoding_hands_the_tokenizer_no_more_than_it_needs(tiny_encoder, monkeypatch):
    encoder = Encoder.load(tiny_encoder, device="cpu")
    long = ["red house " * 100_000, "short"]
    whole = encoder.encode_passages([text[:5_000] for text in long], max_length=100, progress=False)
    seen, call = [], type(encoder.tokenizer).__call__

    def watched(self, texts, **how):
        seen.extend(map(len, texts))
        return call(self, texts, **how)

    monkeypatch.setattr(type(encoder.tokenizer), "__call__", watched)
    assert encoder.encode_passages(long, max_length=100, progress=False).equal(whole)
    assert max(seen) < 10_000
