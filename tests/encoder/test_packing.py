import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from clpl_moe.encoder import packing
from clpl_moe.encoder.packing import PackedTexts, can_pack, embed_packed
from clpl_moe.encoder.settings import pool
from clpl_moe.moe.balance import pop_router_terms, track_routers
from clpl_moe.moe.install import layer_states
from helpers.tiny import DENSE_CLASSES, checkpoint_gradients, make_encoder, make_moe

POOLINGS = ["cls", "mean", "last_token"]
# Unsorted, with neighbours and strangers of equal length, and the longest that the tiny encoders take.
LENGTHS = [7, 1, 12, 12, 3, 38, 1, 7, 2]


def make_sequences(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, 50, (length,), generator=generator).tolist() for length in lengths]


def embed_padded(encoder, sequences, pooling):
    mask = torch.arange(max(map(len, sequences))) < torch.tensor([len(s) for s in sequences]).unsqueeze(1)
    ids = torch.full(mask.shape, encoder.config.pad_token_id)
    ids[mask] = torch.tensor([i for s in sequences for i in s])
    hidden = encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    return pool(hidden, mask, pooling)


def gradients(encoder, embeddings):
    weights = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(5))
    encoder.zero_grad()
    (embeddings * weights).mean(1).sum().backward()
    return {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-6}


def assert_same(encoder, sequences, pooling):
    found = embed_packed(encoder, PackedTexts.from_sequences(sequences), pooling=pooling)
    expected = embed_padded(encoder, sequences, pooling)
    assert found.shape == (len(sequences), 32)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    found, expected = gradients(encoder, found), gradients(encoder, expected)
    assert found.keys() == expected.keys()
    assert "embeddings.word_embeddings.weight" in found
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", DENSE_CLASSES)
def test_embeddings_and_gradients_are_those_of_padded_batches(kind, pooling):
    assert_same(make_encoder(kind), make_sequences(), pooling)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize(("target", "top_k"), [("intermediate", 1), ("output", 1), ("ffn", 2)])
def test_with_experts(target, top_k, pooling):
    encoder = make_moe(target, 3, top_k)
    embed_padded(encoder, make_sequences([3, 9], seed=8), "cls")  # what padding is there is of no later concern
    assert_same(encoder, make_sequences(), pooling)


@pytest.mark.parametrize("lengths", [[1], [38], [5], [4, 4, 4], [1, 38]])
def test_few_texts(lengths):
    assert_same(make_encoder(), make_sequences(lengths), "cls")


def test_no_texts():
    assert embed_packed(make_encoder(), PackedTexts.from_sequences([]), pooling="cls").shape == (0, 32)


@pytest.mark.parametrize("kind", ["xlm-roberta", "bert"])
def test_padding_token_within_a_text(kind):
    """XLM-R gives it no position."""
    sequences = make_sequences([6, 9])
    sequences[0][3] = sequences[1][0] = 1
    assert_same(make_encoder(kind), sequences, "mean")


@pytest.mark.parametrize("pooling", POOLINGS)
def test_no_text_sees_another(pooling):
    """Another second text leaves the others' embeddings as they are, bit by bit, and gets no gradient from them."""
    encoder, sequences = make_encoder(), make_sequences([6, 6, 6])
    inputs = []
    encoder.embeddings.word_embeddings.register_forward_hook(
        lambda module, args, output: inputs.append(output.requires_grad_())
    )
    first = embed_packed(encoder, PackedTexts.from_sequences(sequences), pooling=pooling)
    (gradient,) = torch.autograd.grad(first[[0, 2]].square().sum(), inputs[0])
    assert gradient[0, 6:12].abs().max() == 0
    assert all(gradient[0, part].abs().max() > 0 for part in (slice(6), slice(12, 18)))
    sequences[1] = make_sequences([6], seed=3)[0]
    second = embed_packed(encoder, PackedTexts.from_sequences(sequences), pooling=pooling)
    assert second[[0, 2]].equal(first[[0, 2]])
    assert not torch.allclose(second[1], first[1])


@pytest.mark.parametrize(("pooling", "last"), [("cls", 9), ("last_token", 9), ("mean", sum(LENGTHS))])
def test_tokens_that_are_computed(pooling, last):
    """All real ones, no padding; of the last layer, one row a text where that is enough."""
    encoder, rows = make_encoder(), []
    for name, module in encoder.named_modules():
        if name.endswith(("self.query", "self.key", "attention.output.dense", "intermediate.dense")):
            module.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[:-1].numel()))
    embed_packed(encoder, PackedTexts.from_sequences(make_sequences()), pooling=pooling)
    total = sum(LENGTHS)
    assert rows == [total] * 4 + [last, total, last, last]


def test_normalised():
    found = embed_packed(make_encoder(), PackedTexts.from_sequences(make_sequences()), pooling="cls", normalize=True)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(len(LENGTHS)))


def test_unknown_pooling():
    with pytest.raises(ValueError, match="unknown pooling 'max'"):
        embed_packed(make_encoder(), PackedTexts.from_sequences([[5]]), pooling="max")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_gradient_checkpointing(pooling, reentrant):
    """The same gradients and router losses, also where other texts go through before the backward pass."""
    encoder = make_moe("ffn").train()
    for layer in encoder.encoder.layer:
        layer.attention.self.dropout.p = layer.output.dropout.p = 0.3
    track_routers(encoder)
    results = []
    for checkpointed in (False, True):
        if checkpointed:
            checkpoint_gradients(encoder, reentrant)
        torch.manual_seed(3)
        embeddings = embed_packed(encoder, PackedTexts.from_sequences(make_sequences()), pooling=pooling)
        terms = pop_router_terms(encoder)
        with torch.no_grad():
            embed_padded(encoder, make_sequences([3, 9], seed=8), "cls")
            embed_packed(encoder, PackedTexts.from_sequences(make_sequences([3, 9], seed=8)), pooling=pooling)
        pop_router_terms(encoder)
        results.append((embeddings, gradients(encoder, embeddings), terms.balance, pop_router_terms(encoder)))
    (first, expected, balance, _), (second, found, repeated, left) = results
    assert second.equal(first)
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in expected)
    assert repeated.equal(balance)
    assert left is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_frozen_layers_are_not_checkpointed(reentrant):
    """transformers makes the embeddings require gradients, so that these layers would be run and differentiated again."""
    encoder, calls = make_encoder().train(), []
    encoder.requires_grad_(False)
    encoder.encoder.layer[1].output.requires_grad_(True)
    texts = PackedTexts.from_sequences(make_sequences())
    expected = gradients(encoder, embed_packed(encoder, texts, pooling="cls"))
    checkpoint_gradients(encoder, reentrant)
    for index, layer in enumerate(encoder.encoder.layer):
        layer.intermediate.register_forward_hook(lambda *_, i=index: calls.append(i))
    found = gradients(encoder, embed_packed(encoder, texts, pooling="cls"))
    assert calls == [0, 1, 1]
    assert len(found) == 4
    assert all(found[name].equal(expected[name]) for name in expected)


def test_router_losses_are_those_of_padded_batches():
    encoder = make_moe().train()
    track_routers(encoder)
    embed_padded(encoder, make_sequences(), "mean")
    expected = pop_router_terms(encoder)
    embed_packed(encoder, PackedTexts.from_sequences(make_sequences()), pooling="mean")
    found = pop_router_terms(encoder)
    for name in ("balance", "z", "load"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))


def test_routers_of_the_last_layer_count_pooled_tokens():
    encoder = make_moe(num_experts=2).train()
    track_routers(encoder)
    embed_packed(encoder, PackedTexts.from_sequences(make_sequences()), pooling="cls")
    last = encoder.encoder.layer[1].intermediate.state.records[0]
    assert last.counts.sum() == len(LENGTHS)


@pytest.mark.parametrize("moe", [False, True])
def test_half_precision(moe):
    encoder = make_moe() if moe else make_encoder()
    texts = PackedTexts.from_sequences(make_sequences())
    exact = embed_packed(encoder, texts, pooling="mean", normalize=True)
    with torch.autocast("cpu", torch.bfloat16):
        half = embed_packed(encoder, texts, pooling="mean", normalize=True)
    assert half.dtype == torch.float32
    assert not half.equal(exact)
    assert (half * exact).sum(1).min() > (0.9 if moe else 0.99)  # a token may go to another expert
    assert gradients(encoder, half)
    assert embed_packed(encoder.bfloat16(), texts, pooling="cls").dtype == torch.float32


def test_threads_share_a_model():
    encoder = make_moe()
    sequences = [make_sequences(seed=seed) for seed in range(8)]
    with torch.no_grad():
        expected = [embed_padded(encoder, texts, "cls") for texts in sequences]

    @torch.no_grad()
    def embed(texts):
        return embed_packed(encoder, PackedTexts.from_sequences(texts), pooling="cls")

    with ThreadPoolExecutor(4) as threads:
        for found, wanted in zip(threads.map(embed, sequences), expected):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_encoder_is_left_as_it_was():
    encoder = make_moe().train()
    config, implementation = copy.deepcopy(encoder.config.to_dict()), encoder.config._attn_implementation
    embed_packed(encoder, PackedTexts.from_sequences(make_sequences()), pooling="cls")
    assert encoder.config.to_dict() == config
    assert encoder.config._attn_implementation == implementation
    assert encoder.training
    assert all(not state.is_running() for _, state, _ in layer_states(encoder))


def test_other_encoders_are_padded():
    class Layer(packing.xlmr.XLMRobertaLayer):
        """As a wrapper makes it."""

    encoder = make_encoder()
    assert can_pack(encoder)
    assert can_pack(make_moe())
    encoder.encoder.layer[1].__class__ = Layer
    assert not can_pack(encoder)
    assert not can_pack(torch.nn.Linear(1, 1))
    for pooling in POOLINGS:
        assert_same(encoder, make_sequences(), pooling)


@pytest.mark.parametrize("place", ["forward", "embeddings"])
def test_what_an_encoder_does_besides_its_layers_is_not_left_out(place):
    class Encoder(packing.XLMRobertaModel):
        def forward(self, **inputs):
            output = super().forward(**inputs)
            output.last_hidden_state = output.last_hidden_state * torch.linspace(0.1, 2, 32)
            return output

    class Embeddings(packing.xlmr.XLMRobertaEmbeddings):
        def forward(self, **inputs):
            return super().forward(**inputs) * torch.linspace(0.1, 2, 32)

    encoder = make_encoder()
    if place == "forward":
        encoder.__class__ = Encoder
    else:
        encoder.embeddings.__class__ = Embeddings
    assert not can_pack(encoder)
    assert_same(encoder, make_sequences(), "mean")


class TestPackedTexts:
    def test_layout(self):
        texts = PackedTexts.from_sequences([[5, 6], [7], [8, 9, 10]])
        assert len(texts) == 3
        assert texts.input_ids.tolist() == [5, 6, 7, 8, 9, 10]
        assert texts.lengths.tolist() == [2, 1, 3]
        assert texts.offsets.tolist() == [0, 2, 3, 6]
        assert texts.input_ids.dtype == texts.lengths.dtype == texts.offsets.dtype == torch.int64

    @pytest.mark.parametrize("rows", [[2, 0], [1, 1, 2], torch.tensor([0, 1, 2]), []])
    def test_select(self, rows):
        sequences = [[5, 6], [7], [8, 9, 10]]
        found = PackedTexts.from_sequences(sequences).select(rows)
        expected = PackedTexts.from_sequences([sequences[row] for row in rows])
        for name in ("input_ids", "lengths", "offsets"):
            assert getattr(found, name).equal(getattr(expected, name))

    def test_to_moves_all_but_the_lengths(self):
        moved = PackedTexts.from_sequences([[5, 6], [7]]).to("meta")
        assert moved.input_ids.device.type == moved.offsets.device.type == "meta"
        assert moved.lengths.tolist() == [2, 1]

    def test_empty_text(self):
        with pytest.raises(ValueError, match="text 1 has no tokens"):
            PackedTexts.from_sequences([[5], []])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestCuda:
    def encoder(self, moe, dropout=0.0):
        encoder = make_moe() if moe else make_encoder()
        for layer in encoder.encoder.layer:
            layer.attention.self.dropout.p = dropout
        return encoder.cuda()

    @pytest.mark.parametrize("pooling", POOLINGS)
    @pytest.mark.parametrize("moe", [False, True])
    def test_flash_attention(self, pooling, moe):
        encoder = self.encoder(moe)
        texts = PackedTexts.from_sequences(make_sequences()).pin_memory().to("cuda")
        exact = embed_packed(encoder, texts, pooling=pooling, normalize=True)
        assert not packing._flash_fits(encoder, exact.device)
        with torch.autocast("cuda", torch.bfloat16):
            assert packing._flash_fits(encoder, exact.device)
            half = embed_packed(encoder, texts, pooling=pooling, normalize=True)
        assert (half * exact).sum(1).min() > (0.9 if moe else 0.99)

    @pytest.mark.parametrize("pooling", POOLINGS)
    def test_gradients(self, pooling, monkeypatch):
        """Those of grouped attention in the same precision, about."""
        encoder = self.encoder(moe=False)
        texts = PackedTexts.from_sequences(make_sequences()).to("cuda")
        found = []
        for flash in (True, False):
            monkeypatch.setattr(packing, "_flash_fits", lambda *_, f=flash: f)
            encoder.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                embeddings = embed_packed(encoder, texts, pooling=pooling)
            embeddings.square().sum().backward()
            found.append(encoder.encoder.layer[0].attention.self.value.weight.grad)
        assert torch.cosine_similarity(*(g.flatten() for g in found), dim=0) > 0.99

    @pytest.mark.parametrize("pooling", POOLINGS)
    def test_dropout(self, pooling):
        """The mean over dropped attention is about the embedding without; gradients come back."""
        encoder = self.encoder(moe=False, dropout=0.1)
        texts = PackedTexts.from_sequences(make_sequences()).to("cuda")
        with torch.autocast("cuda", torch.bfloat16):
            exact = embed_packed(encoder, texts, pooling=pooling, normalize=True)
            encoder.train()
            torch.manual_seed(0)
            runs = torch.stack([embed_packed(encoder, texts, pooling=pooling, normalize=True) for _ in range(50)])
        assert not runs[0].equal(runs[1])
        assert torch.cosine_similarity(runs.mean(0), exact).min() > 0.9
        runs.square().sum().backward()
        assert encoder.encoder.layer[0].attention.self.query.weight.grad.isfinite().all()
