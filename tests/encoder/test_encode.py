import dataclasses
import threading
import time

import numpy as np
import pytest
import torch

from clpl_moe.common.errors import OptionError, UserError
from clpl_moe.encoder import Encoder, load_encoder, packing
from clpl_moe.encoder import encode as encode_module
from clpl_moe.encoder.encode import encode
from clpl_moe.encoder.settings import EmbeddingSettings, pool
from helpers.tiny import make_encoder

TEXTS = ["한국어 문장", "a", "متن فارسی", "हिन्दी", "a longer sentence than the others " * 2, "", "a", "bc"]
SETTINGS = EmbeddingSettings(pooling="mean", query_prompt="query: ", passage_prompt="passage: ")


@pytest.fixture(scope="module")
def encoder(tiny_encoder):
    return Encoder(*load_encoder(tiny_encoder), SETTINGS, compute_dtype=torch.float32)


def one_by_one(encoder, texts, prompt, max_length):
    model, tokenizer, settings = encoder.model, encoder.tokenizer, encoder.settings
    rows = []
    with torch.no_grad():
        for text in texts:
            inputs = tokenizer(prompt + text, truncation=True, max_length=max_length, return_tensors="pt")
            mask = inputs["attention_mask"]
            hidden = model(input_ids=inputs["input_ids"], attention_mask=mask).last_hidden_state
            rows.append(pool(hidden, mask, settings.pooling)[0])
    rows = torch.stack(rows)
    return torch.nn.functional.normalize(rows, dim=1) if settings.normalize else rows


@pytest.mark.parametrize("pooling", ["cls", "mean", "last_token"])
@pytest.mark.parametrize("kind", ["query", "passage"])
@pytest.mark.parametrize("batch_tokens", [1, 60, 16384])
def test_equals_one_by_one(encoder, pooling, kind, batch_tokens):
    settings = dataclasses.replace(SETTINGS, pooling=pooling, normalize=kind == "query")
    encoder = dataclasses.replace(encoder, settings=settings)
    embeddings = encode(encoder, TEXTS, kind=kind, max_length=20, batch_tokens=batch_tokens, progress=False)
    expected = one_by_one(encoder, TEXTS, f"{kind}: ", max_length=20)
    assert embeddings.shape == (len(TEXTS), 32)
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(embeddings, expected, atol=1e-5, rtol=0)
    assert torch.equal(embeddings[1], embeddings[6])
    # What is compared does depend on the text and the prompt.
    assert (expected[1] - expected[7]).abs().max() > 1e-2


@pytest.fixture
def three_threads(monkeypatch):
    """Three of them for an encoder and texts of any size."""
    monkeypatch.setattr(encode_module, "_LEAST_WIDTH", 1)
    monkeypatch.setattr(encode_module, "_LEAST_TOKENS_A_CORE", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert after == 3


HOW = {"kind": "passage", "max_length": 20, "progress": False}
MANY = [f"{i} {'text ' * (i % 5)}" for i in range(30)]


def spy(monkeypatch, before):
    """Call ``before`` with the token ids of each batch, in the thread that runs it."""
    embed = encode_module._embed
    monkeypatch.setattr(encode_module, "_embed", lambda *args: before(args[1]) or embed(*args))


@pytest.mark.parametrize("batch_tokens", [1, 40, 2048])
def test_each_core_has_a_batch_of_its_own(encoder, monkeypatch, three_threads, batch_tokens):
    expected = encode(encoder, MANY, **HOW | {"batch_tokens": 1})
    together, sizes = threading.Barrier(3), []

    def meet(sequences):
        assert torch.get_num_threads() == 1
        sizes.append(sum(map(len, sequences)))
        if len(sizes) <= 3:
            together.wait(timeout=60)  # fails unless three batches are under way

    spy(monkeypatch, meet)
    tokenized = encode_module.tokenize(encoder, MANY, kind="passage", max_length=20)
    done = []
    embeddings = encode_module.encode_tokenized(encoder, tokenized, batch_tokens=batch_tokens, on_batch=done.append)
    assert sum(done) == 30
    assert len(done) == len(sizes)
    assert max(sizes) <= max(batch_tokens, 20)  # a text at least
    if batch_tokens == 2048:
        assert len(sizes) == 3
        assert max(sizes) - min(sizes) <= 20  # a text
    torch.testing.assert_close(embeddings, expected, atol=1e-6, rtol=0)


def test_equal_to_one_thread(encoder, monkeypatch, three_threads):
    embeddings = encode(encoder, MANY, batch_tokens=1, **HOW)
    torch.set_num_threads(1)
    threads = []
    spy(monkeypatch, lambda _: threads.append(threading.current_thread()))
    assert torch.equal(embeddings, encode(encoder, MANY, batch_tokens=1, **HOW))
    assert set(threads) == {threading.main_thread()}
    torch.set_num_threads(3)


@pytest.mark.parametrize("workers", [2, 3, 16])
@pytest.mark.parametrize("budget", [1, 300, 512, 1000, 1024, 5000])
def test_even_batches(workers, budget):
    generator = np.random.default_rng(workers)
    sequences = [np.zeros(n, np.int32) for n in generator.integers(1, 500, 700)]
    parts = encode_module._even_batches(sequences, budget, workers)
    assert sorted(i for part in parts for i in part) == list(range(700))
    sizes = [sum(len(sequences[i]) for i in part) for part in parts]
    assert all(size <= budget or len(part) == 1 for size, part in zip(sizes, parts, strict=True))
    lengths = [len(sequences[i]) for part in parts for i in part]
    assert lengths == sorted(lengths, reverse=True)
    if budget >= 1000:
        assert len(parts) % workers == 0
        assert max(sizes) - min(sizes) < 2 * 500


@pytest.mark.parametrize("limit", ["_LEAST_WIDTH", "_LEAST_TOKENS_A_CORE"])
def test_little_work_has_all_cores(encoder, monkeypatch, three_threads, limit):
    monkeypatch.setattr(encode_module, limit, 256)
    threads = []
    spy(monkeypatch, lambda _: threads.append(torch.get_num_threads()))
    encode(encoder, TEXTS, **HOW)
    assert threads == [3]


def test_what_a_core_meets_ends_the_encoding(encoder, monkeypatch, three_threads):
    calls = []

    def full(sequences):
        calls.append(sequences)
        time.sleep(0.01)  # without it all may be done before the main thread has its turn
        raise torch.OutOfMemoryError

    spy(monkeypatch, full)
    with pytest.raises(UserError, match="lower the tokens a batch, now 1"):
        encode(encoder, [str(i) for i in range(3000)], batch_tokens=1, **HOW)
    assert len(calls) < 3000


@pytest.mark.parametrize("packs", [True, False])
def test_batches_keep_to_the_budget(encoder, monkeypatch, packs):
    """Without padding where the encoder allows it; otherwise with little."""
    if not packs:
        monkeypatch.setattr(packing, "_ENCODERS", ())
    shapes = []
    hook = encoder.model.embeddings.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    texts = ["x" * (1 + i * 7 % 50) for i in range(200)]
    monkeypatch.setattr(encode_module, "_TOKENIZE_AT_ONCE", 16)
    encoder = dataclasses.replace(encoder, settings=EmbeddingSettings())
    encode(encoder, texts, kind="query", max_length=60, batch_tokens=200, progress=False)
    hook.remove()
    tokens = sum(length + 2 for length in range(1, 51))  # equal texts once
    assert all(rows * length <= 200 for rows, length in shapes)
    if packs:
        assert sum(rows * length for rows, length in shapes) == tokens
        assert len(shapes) < 1.2 * tokens / 200
    else:
        assert sum(rows for rows, _ in shapes) == 50
        assert tokens < sum(rows * length for rows, length in shapes) < 1.1 * tokens
        assert shapes[0][1] == max(length for _, length in shapes)


def test_other_encoders_are_padded_and_give_the_same(encoder, monkeypatch):
    arguments = {"kind": "query", "max_length": 20, "progress": False}
    packed = encode(encoder, TEXTS, **arguments)
    monkeypatch.setattr(packing, "_ENCODERS", ())
    torch.testing.assert_close(encode(encoder, TEXTS, **arguments), packed, atol=1e-5, rtol=0)


def test_leaves_modes_gradients_and_random_state_alone(tiny_tokenizer):
    model = make_encoder(vocab_size=len(tiny_tokenizer), hidden_dropout_prob=0.5).train()
    model.encoder.layer[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    runs = [
        encode(
            Encoder(model, tiny_tokenizer, SETTINGS, compute_dtype=dtype),
            TEXTS,
            kind="query",
            max_length=20,
            progress=False,
        )
        for dtype in (torch.float32, torch.bfloat16, torch.float32)
    ]
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(runs[0], runs[2])  # without dropout
    assert not runs[0].requires_grad
    # Inference in the middle of an autocast block leaves nothing in it that cannot be trained.
    with torch.autocast("cpu", torch.bfloat16):
        inputs = {
            "input_ids": torch.tensor([[0, 5, 2]]),
            "attention_mask": torch.ones(1, 3, dtype=torch.long),
        }
        half = Encoder(model, tiny_tokenizer, SETTINGS, compute_dtype=torch.bfloat16)
        encode(half, ["x"], kind="query", max_length=20, progress=False)
        model(**inputs).last_hidden_state.sum().backward()
    assert model.encoder.layer[1].output.dense.weight.grad is not None


def test_mode_is_restored_after_an_error(encoder):
    encoder = dataclasses.replace(encoder, settings=EmbeddingSettings(pooling="sum"))
    encoder.train()
    with pytest.raises(ValueError, match="unknown pooling"):
        encode(encoder, ["x"], kind="query", max_length=9, progress=False)
    assert encoder.model.training
    encoder.eval()


def test_precision(encoder):
    arguments = {"kind": "query", "max_length": 20, "progress": False}
    exact = encode(encoder, TEXTS, **arguments)
    half = encode(dataclasses.replace(encoder, compute_dtype=torch.bfloat16), TEXTS, **arguments)
    assert half.dtype == torch.float32
    assert not torch.equal(half, exact)
    assert (half * exact).sum(dim=1).min() > 0.99
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encode(encoder, TEXTS, **arguments), exact)


def test_no_texts(encoder):
    embeddings = encode(encoder, [], kind="query", max_length=20, progress=False)
    assert embeddings.shape == (0, 32)


def test_longer_than_the_encoder_takes(encoder):
    with pytest.raises(OptionError, match="max_length: found 129 tokens, the encoder takes 128 at most"):
        encode(encoder, ["x"], kind="passage", max_length=129, progress=False)
    texts = ["x" * 500]
    cut = encode(encoder, texts, kind="passage", max_length=128, progress=False)
    assert cut.isfinite().all()
    assert torch.equal(encode(encoder, texts, kind="passage", progress=False), cut)  # the encoder's own length
