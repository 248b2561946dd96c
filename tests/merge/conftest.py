import pytest
import torch

from clpl_moe import Encoder, MoEConfig, inject_moe
from helpers.evaluating import make_collections
from helpers.tiny import perturb_experts


@pytest.fixture
def collections(tmp_path):
    return make_collections(tmp_path / "data")


@pytest.fixture
def tuned(tiny_encoder, tmp_path):
    """The tiny encoder with experts that differ, and with other embeddings and heads, as after training."""
    encoder = Encoder.load(tiny_encoder, device="cpu")
    inject_moe(encoder, MoEConfig(num_experts=3, target="ffn"))
    perturb_experts(encoder.model)
    with torch.no_grad():
        encoder.model.embeddings.word_embeddings.weight += 0.3 * torch.randn(32)
    heads = {"sparse_linear.pt": {"weight": torch.ones(1, 32), "bias": torch.ones(1)}}
    encoder.save(tmp_path / "tuned", heads=heads)
    return tmp_path / "tuned"
