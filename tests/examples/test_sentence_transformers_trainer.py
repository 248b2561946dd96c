"""The example runs on a tiny model, and changes it."""

import importlib.util
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer

from clpl_moe import load_encoder, save_encoder
from clpl_moe.encoder.settings import EmbeddingSettings

EXAMPLE = Path(__file__).parents[2] / "examples/sentence_transformers_trainer.py"


@pytest.mark.parametrize("prompts", [("", ""), ("query: ", "passage: ")])
def test_it_trains(tmp_path, tiny_encoder, prompts):
    settings = EmbeddingSettings(query_prompt=prompts[0], passage_prompt=prompts[1])
    save_encoder(*load_encoder(tiny_encoder), tmp_path / "base", settings)
    spec = importlib.util.spec_from_file_location("sentence_transformers_trainer", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    given = []

    class Loss(example.SentenceTransformerCLPLLoss):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.loss.register_forward_hook(lambda _, args, output: given.append((args[3].tolist(), output)))

    example.SentenceTransformerCLPLLoss = Loss
    example.main(["--model", str(tmp_path / "base"), "--output", str(tmp_path / "run")])
    ((index, terms),) = given
    assert len(index) == 3  # one row has no negative query
    assert terms.penalty > 0
    before, after = (SentenceTransformer(str(tmp_path / name), device="cpu") for name in ("base", "run/final"))
    assert not torch.equal(*(torch.tensor(model.encode_query(["When?"])) for model in (before, after)))
