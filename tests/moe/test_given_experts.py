"""Experts that are given with the texts: by their data file in training, chosen in evaluation."""

import copy

import pytest
import torch

from clpl_moe import Encoder, MoEConfig, inject_moe, load_encoder, merge_experts
from clpl_moe.encoder.packing import PackedTexts, embed_packed
from clpl_moe.moe.balance import pop_router_terms, track_routers
from clpl_moe.moe.inject import choose_expert, expert_parameters
from helpers.tiny import checkpoint_gradients, make_batch, make_encoder, make_moe

TARGETS = ["intermediate", "output", "ffn"]
SEQUENCES = [[0, 5, 6, 7, 2], [0, 7, 2], [0, 9, 8, 2], [0, 4, 2]]


def packed(experts=None):
    texts = PackedTexts.from_sequences(SEQUENCES)
    texts.experts = None if experts is None else torch.tensor(experts)
    return texts


def alone(encoder, number):
    """The encoder made dense with one of its experts."""
    return merge_experts(copy.deepcopy(encoder), torch.eye(3)[[number, number]])


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("target", TARGETS)
def test_each_text_goes_to_its_expert(target, pooling):
    encoder = make_moe(target, router="given")
    found = embed_packed(encoder, packed([2, 0, 1, 2]), pooling=pooling)
    for row, number in enumerate([2, 0, 1, 2]):
        expected = embed_packed(alone(encoder, number), packed().select([row]), pooling=pooling)
        torch.testing.assert_close(found[row], expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", TARGETS)
def test_the_chosen_expert_takes_all_other_texts(target):
    encoder, batch = make_moe(target, router="given"), make_batch([9, 4])
    mask = batch["attention_mask"].bool()
    for number in (0, 2):
        expected = alone(encoder, number)
        if number:
            choose_expert(encoder, number)
        torch.testing.assert_close(encoder(**batch)[0][mask], expected(**batch)[0][mask])
        found, wanted = (embed_packed(each, packed(), pooling="cls") for each in (encoder, expected))
        torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(copy.deepcopy(encoder)(**batch)[0], encoder(**batch)[0])


@pytest.mark.parametrize("checkpointed", [False, True])
def test_experts_without_texts_get_no_gradient(checkpointed):
    encoder = make_moe("ffn", router="given").train()
    if checkpointed:
        checkpoint_gradients(encoder)
    track_routers(encoder)
    found = embed_packed(encoder, packed([2, 1, 1, 2]), pooling="cls")
    load = pop_router_terms(encoder).load
    torch.testing.assert_close(load[0], torch.tensor([0, 7 / 15, 8 / 15]))
    embed_packed(encoder, packed([0, 0, 0, 0]), pooling="cls")  # another pass in between
    found.pow(3).sum().backward()
    for name, parameter in expert_parameters(encoder):
        assert [bool(gradient.any()) for gradient in parameter.grad] == [False, True, True], name


def test_a_folder_remembers_the_choice(tiny_tokenizer, tmp_path):
    size = {"vocab_size": len(tiny_tokenizer), "max_position_embeddings": 130}
    model = inject_moe(make_encoder(**size), MoEConfig(3, router="given"))
    with torch.no_grad():
        for _, parameter in expert_parameters(model):
            parameter[2] += 0.3
    encoder, batch = Encoder(model, tiny_tokenizer), make_batch([9, 4])
    before, unchosen = encoder.fingerprint(), model(**batch)[0]
    choose_expert(encoder, 2)
    assert encoder.fingerprint() != before  # so that no results are taken for another expert's
    encoder.save(tmp_path)
    loaded, _ = load_encoder(tmp_path)
    torch.testing.assert_close(loaded(**batch)[0], model(**batch)[0])
    assert not torch.allclose(loaded(**batch)[0], unchosen, atol=1e-2)
    choose_expert(loaded, 0)
    torch.testing.assert_close(loaded(**batch)[0], unchosen)
    assert "expert" not in loaded.config.moe


def test_experts_that_cannot_be_chosen():
    with pytest.raises(ValueError, match="expert is 3: choose a number from 0 to 2"):
        choose_expert(make_moe(router="given"), 3)
    for other in (make_moe(), make_encoder()):
        with pytest.raises(ValueError, match="has no experts with router given"):
            choose_expert(other, 1)
    with pytest.raises(ValueError, match="expert is 2: choose a number from 0 to 1"):
        MoEConfig(router="given", expert=2)
