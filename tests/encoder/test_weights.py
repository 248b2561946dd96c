import pytest
import torch

from clpl_moe.common.errors import UserError
from clpl_moe.encoder.weights import load_weights, read_weights, weight_names
from helpers.tiny import make_batch, make_encoder, make_moe


@pytest.mark.parametrize("size", ["20KB", "5GB"])
def test_weights_in_one_file_or_several(tmp_path, size):
    encoder, batch = make_moe(), make_batch([9, 4])
    encoder.save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors.index.json").is_file() is (size == "20KB")
    other = make_moe(perturb=False)
    load_weights(other, tmp_path)
    assert torch.equal(other(**batch)[0], encoder(**batch)[0])
    state = encoder.state_dict()
    assert sorted(weight_names(str(tmp_path), {})) == sorted(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in read_weights(str(tmp_path), {}).items())


def test_load_weights_refuses_another_model(tmp_path):
    make_encoder().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="the weights do not fit this model"):
        load_weights(make_moe(), tmp_path)
