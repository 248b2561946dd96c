import pytest
import torch

from clpl_moe import CLPLLoss
from clpl_moe.encoder.load import load_encoder
from clpl_moe.encoder.settings import EmbeddingSettings
from clpl_moe.moe.config import MoEConfig
from clpl_moe.moe.inject import inject_moe
from clpl_moe.train.model import CLPLModel
from helpers.tiny import perturb_experts


@pytest.fixture
def make_model(tiny_encoder):
    """Builds the same model each time; its experts differ."""

    def make(num_experts=2, loss=None, settings=None, **options):
        torch.manual_seed(1)
        encoder, tokenizer = load_encoder(tiny_encoder)
        if num_experts:
            perturb_experts(inject_moe(encoder, MoEConfig(num_experts, 1)))
        heads = {"colbert_linear": None, "sparse_linear": None}
        options = {"unified_finetuning": False, "use_self_distill": False} | options
        if options["unified_finetuning"]:
            heads = {"colbert_linear": torch.nn.Linear(32, 32), "sparse_linear": torch.nn.Linear(32, 1)}
        loss = loss or CLPLLoss(0.1, 0.3)
        settings = settings or EmbeddingSettings(pooling="mean")
        model = CLPLModel({"model": encoder, **heads}, loss=loss, settings=settings, tokenizer=tokenizer, **options)
        return model.train()

    return make
