"""One expert for all tokens, drawn in training; the mean of all in evaluation."""

import copy

import pytest
import torch

from clpl_moe import Encoder, MoEConfig, inject_moe, load_encoder, merge_experts
from clpl_moe.encoder.packing import PackedTexts, embed_packed
from clpl_moe.moe.balance import measure_load, pop_router_terms, track_routers
from clpl_moe.moe.inject import expert_parameters
from clpl_moe.moe.install import layer_states
from helpers.tiny import checkpoint_gradients, make_batch, make_encoder, make_moe

TARGETS = ["intermediate", "output", "ffn"]


def drawn(encoder):
    """The number of the expert that each layer drew in the last tracked pass."""
    terms = pop_router_terms(encoder)
    assert ((terms.load == 0) | (terms.load == 1)).all()
    return terms.load.argmax(1).tolist()


def alone(encoder, numbers):
    """The encoder made dense with one expert of each layer."""
    return merge_experts(copy.deepcopy(encoder), torch.eye(3)[numbers])


@pytest.mark.parametrize("target", TARGETS)
def test_evaluation_is_the_merged_encoder(target):
    encoder, batch = make_moe(target, router="random"), make_batch([9, 4])
    merged = merge_experts(copy.deepcopy(encoder))
    mask = batch["attention_mask"].bool()
    torch.testing.assert_close(encoder(**batch)[0][mask], merged(**batch)[0][mask])
    packed = PackedTexts.from_sequences([[0, 5, 6, 2], [0, 7, 2]])
    for pooling in ("cls", "mean"):
        found, expected = (embed_packed(each, packed, pooling=pooling) for each in (encoder, merged))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("target", TARGETS)
def test_training_computes_one_drawn_expert_and_trains_no_other(target):
    encoder, batch = make_moe(target, router="random").train(), make_batch([9, 4])
    mask, seen = batch["attention_mask"].bool(), set()
    for _ in range(12):
        track_routers(encoder)
        found = encoder(**batch)[0][mask]
        numbers = drawn(encoder)
        seen.add(tuple(numbers))
        torch.testing.assert_close(found, alone(encoder, numbers)(**batch)[0][mask])
        encoder.zero_grad()
        found.pow(3).sum().backward()
        for name, parameter in expert_parameters(encoder):
            layer = int(name.split(".")[2])
            trained = [bool(gradient.any()) for gradient in parameter.grad]
            assert trained == [number == numbers[layer] for number in range(3)]
    assert len(seen) >= 5  # layers draw by themselves
    assert len({numbers[0] for numbers in seen}) == 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_again(reentrant):
    gradients = []
    for checkpointed in (False, True):
        encoder = make_moe(router="random").train()
        if checkpointed:
            checkpoint_gradients(encoder, reentrant)
        torch.manual_seed(3)
        encoder(**make_batch([9, 4]))[0].pow(3).sum().backward()
        gradients.append({name: p.grad for name, p in expert_parameters(encoder)})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_nothing_of_the_router_is_trained_and_its_load_is_even():
    encoder = make_moe(router="random")
    assert not any("router" in name for name, _ in encoder.named_parameters())
    load = measure_load(encoder, lambda: encoder(**make_batch([9, 4])))
    assert torch.equal(load, torch.full((2, 3), 1 / 3))
    assert all(not router.weight.any() for _, _, router in layer_states(encoder))


def test_it_is_saved_and_loaded(tiny_tokenizer, tmp_path):
    size = {"vocab_size": len(tiny_tokenizer), "max_position_embeddings": 130}
    model = inject_moe(make_encoder(**size), MoEConfig(3, 1, "ffn", router="random"))
    Encoder(model, tiny_tokenizer).save(tmp_path)
    loaded, _ = load_encoder(tmp_path)
    batch = make_batch([9, 4])
    torch.testing.assert_close(loaded(**batch)[0], model(**batch)[0])
