from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from clpl_moe.common.errors import OptionError
from clpl_moe.encoder import Encoder
from clpl_moe.encoder.frozen_cache import FrozenCache, set_frozen_cache
from clpl_moe.encoder.packing import PackedTexts, embed_packed
from helpers.tiny import DENSE_CLASSES, checkpoint_gradients, make_encoder, make_tokenizer

POOLINGS = ["cls", "mean", "last_token"]
LENGTHS = [7, 4, 12, 12, 3, 38, 7, 5]


def make_texts(lengths=LENGTHS, seed=0, experts=None):
    generator = torch.Generator().manual_seed(seed)
    return PackedTexts(
        torch.randint(4, 50, (sum(lengths),), generator=generator), torch.tensor(lengths), experts=experts
    )


def make_frozen(kind="xlm-roberta", layers=2, **options):
    """An encoder of three layers, the lowest frozen, and the number of tokens that each call of a frozen layer got."""
    encoder, calls = make_encoder(kind, num_hidden_layers=3, **options), []
    for part in (encoder.embeddings, *encoder.encoder.layer[:layers]):
        part.requires_grad_(False)
    encoder.encoder.layer[0].intermediate.register_forward_hook(lambda *of: calls.append(of[1][0].shape[1]))
    return encoder, calls


def cached(encoder, layers=2, tokens=10_000, **options):
    cache = FrozenCache(layers, 32, tokens * 32 * options.get("dtype", torch.float32).itemsize, **options)
    set_frozen_cache(encoder, cache)
    return cache


def gradients(encoder, embeddings):
    encoder.zero_grad()
    (embeddings * torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(5))).sum().backward()
    return {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", DENSE_CLASSES)
def test_embeddings_and_gradients_are_those_without(kind, pooling, checkpointing):
    encoder, calls = make_frozen(kind)
    if checkpointing is not None:
        checkpoint_gradients(encoder.train(), reentrant=checkpointing)
    texts = make_texts()
    expected = embed_packed(encoder, texts, pooling=pooling)
    expected_gradients = gradients(encoder, expected)
    cache = cached(encoder)
    for _ in range(2):
        found = embed_packed(encoder, texts, pooling=pooling)
        assert torch.equal(found, expected)
        found_gradients = gradients(encoder, found)
        assert found_gradients.keys() == expected_gradients.keys()
        for name, gradient in expected_gradients.items():
            torch.testing.assert_close(found_gradients[name], gradient)
    assert calls == [88, 88]  # without, and once with
    assert len(cache) == 8


def test_only_unknown_texts_are_computed():
    encoder, calls = make_frozen()
    texts = make_texts()
    expected = embed_packed(encoder, texts, pooling="mean").detach()
    cached(encoder)
    embed_packed(encoder, texts.select([2, 0, 4]), pooling="mean")
    found = embed_packed(encoder, texts, pooling="mean")
    assert calls == [88, 22, 66]
    torch.testing.assert_close(found, expected)
    found = embed_packed(encoder, texts.select([5, 5, 1, 7, 2]), pooling="mean")
    torch.testing.assert_close(found, expected[[5, 5, 1, 7, 2]])
    assert len(calls) == 3


def test_a_full_cache_keeps_what_it_has(caplog):
    encoder, calls = make_frozen()
    texts = make_texts()
    expected = embed_packed(encoder, texts, pooling="cls").detach()
    cache = cached(encoder, tokens=30)
    for _ in range(2):
        torch.testing.assert_close(embed_packed(encoder, texts, pooling="cls"), expected)
    # In the order of their lengths: 3, 4, 5, 7 and 7, not 12, 12 and 38.
    assert calls == [88, 88, 62]
    assert len(cache) == 5
    assert caplog.text.count("the frozen layers' outputs of 5 texts fill frozen_cache_gb") == 1


def test_no_room():
    with pytest.raises(OptionError, match=r"frozen_cache_gb: found no room of 1e\+09 GB in memory"):
        FrozenCache(1, 32, 10**18)
    assert len(FrozenCache(1, 32, 0)) == 0


def test_frozen_layers_have_no_dropout_kept_or_not():
    encoder, _ = make_frozen(hidden_dropout_prob=0.5)
    texts = make_texts()
    encoder.encoder.layer[2].eval()
    expected = embed_packed(encoder.eval(), texts, pooling="mean")
    for layer in encoder.encoder.layer[:2]:
        layer.train()
    encoder.embeddings.train()
    assert not torch.allclose(embed_packed(encoder, texts, pooling="mean"), expected)
    for tokens in (0, 10_000):
        cached(encoder, tokens=tokens)
        for _ in range(2):
            torch.testing.assert_close(embed_packed(encoder, texts, pooling="mean"), expected)
    assert encoder.embeddings.dropout.training
    assert all(module.training for layer in encoder.encoder.layer[:2] for module in layer.modules())


def test_half_precision_is_the_same_for_kept_texts_and_others():
    encoder, calls = make_frozen()
    texts = make_texts()
    expected = embed_packed(encoder, texts, pooling="mean").detach()
    cached(encoder, dtype=torch.float16)
    first, second = (embed_packed(encoder, texts, pooling="mean").detach() for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, expected)
    torch.testing.assert_close(first, expected, atol=2e-3, rtol=0)
    # Each precision has states of its own.
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            embed_packed(encoder, texts, pooling="mean")
    assert calls == [88] * 3


def make_whole():
    encoder, calls = make_frozen(vocab_size=2000)
    return Encoder(encoder, make_tokenizer(), compute_dtype=torch.float32), calls


TEXTS = [*["ab", "abc d", "efgh", "ij", "a b c d e"] * 2, "xyz"]


def test_threads_and_training_share_states():
    whole, calls = make_whole()
    expected = whole.encode_passages(TEXTS, progress=False)
    cached(whole.model)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda i: whole.encode_passages(TEXTS[i:], progress=False), range(4)))
    for start, part in enumerate(found):
        torch.testing.assert_close(part, expected[start:])
    calls.clear()
    # States that were made in inference mode serve a pass with gradients.
    embeddings = whole.embed(TEXTS, "passage")
    torch.testing.assert_close(embeddings.detach(), expected)
    gradients(whole.model, embeddings)
    assert not calls


def test_encoding_keeps_the_bits_that_training_would(monkeypatch):
    """Though on some processors it has other Linear layers, which here add something."""

    class Linear(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **kwargs or {})
            return result + 0.1 if func is torch.nn.functional.linear else result

    monkeypatch.setattr("clpl_moe.encoder.encode.onednn_linear", lambda *args: Linear())
    kept = []
    for run in (lambda w: w.encode_passages(TEXTS, progress=False), lambda w: w.embed(TEXTS, "passage")):
        whole, _ = make_whole()
        cache = cached(whole.model)
        run(whole)
        kept.append({key: cache._states[place].clone() for key, place in cache._places.items()})
    assert kept[0].keys() == kept[1].keys()
    assert all(torch.equal(kept[0][key], kept[1][key]) for key in kept[0])


def test_texts_on_a_device_have_kept_their_token_ids():
    texts = make_texts()
    there = texts.to("meta")
    assert there.input_ids.is_meta
    assert torch.equal(there.host_ids, texts.input_ids)
    assert torch.equal(there.to("meta").host_ids, texts.input_ids)
