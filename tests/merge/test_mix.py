import pytest
import torch

from clpl_moe import Encoder, merge_experts
from clpl_moe.common.errors import UserError
from clpl_moe.merge.mix import Mixer
from helpers.tiny import make_encoder


@pytest.fixture
def pair(tiny_encoder, tuned):
    return merge_experts(Encoder.load(tuned, device="cpu")), Encoder.load(tiny_encoder, device="cpu")


def test_both_ends_are_exact_and_the_middle_is_between(pair):
    encoder, base = pair
    tuned = {name: tensor.clone() for name, tensor in encoder.model.state_dict().items()}
    mixer = Mixer(encoder, base)
    for alpha in (0.25, 0.0, 1.0):  # in any order: nothing is mixed twice
        mixer.mix(alpha)
        for name, found in encoder.model.state_dict().items():
            expected = (1 - alpha) * base.model.state_dict()[name] + alpha * tuned[name]
            torch.testing.assert_close(found, expected, rtol=0, atol=0 if alpha in (0, 1) else 1e-6)


def test_heads_are_mixed_where_both_have_them(pair):
    encoder, base = pair
    head = torch.load(base.head_files["sparse_linear.pt"])
    mixed = Mixer(encoder, base).heads(0.75)["sparse_linear.pt"]
    torch.testing.assert_close(mixed["weight"], 0.25 * head["weight"] + 0.75)
    base.head_files = {}
    assert Mixer(encoder, base).heads(0.75) == {}


def test_weights_of_another_shape_are_refused(pair):
    encoder, base = pair
    base.model = make_encoder(num_hidden_layers=1, vocab_size=len(base.tokenizer), max_position_embeddings=130)
    with pytest.raises(UserError, match=r"base: found nothing for the weights 'encoder.layer.1"):
        Mixer(encoder, base)
