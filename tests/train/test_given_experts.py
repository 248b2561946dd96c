"""Training with the experts that data files name: what no file names stays the base's, bit for bit."""

import json

import pytest
import torch

from clpl_moe import Encoder, load_encoder
from clpl_moe.common.errors import UserError
from clpl_moe.evaluate import evaluate
from clpl_moe.evaluate.evaluation import evaluate_retrieval
from clpl_moe.moe.inject import choose_expert, expert_parameters
from clpl_moe.retrieval.collection import Collection
from clpl_moe.retrieval.options import EncodingArguments
from clpl_moe.train import train
from helpers.tiny_training import arguments, make_collection, write_triplets


@pytest.fixture
def options(tiny_encoder, tmp_path):
    argv = arguments(tiny_encoder, "", tmp_path / "run", num_experts=3, router="given", learning_rate=0.01)
    values = dict(zip((name.removeprefix("--") for name in argv[::2]), argv[1::2]))
    data = [write_triplets(tmp_path / f"{name}.jsonl", 8, seed=seed) for seed, name in enumerate(("ko", "fa"))]
    return values | {"train_data": list(map(str, data)), "experts_of_data": [1, 2], "trainable": "moe"}


@pytest.mark.parametrize("more", [{}, {"grad_cache_tokens": 60, "gradient_checkpointing": True}])
def test_the_base_stays_and_each_file_trains_its_expert(options, tiny_encoder, tmp_path, more):
    run = train(**options | more)
    base, trained = Encoder.load(tiny_encoder, device="cpu"), Encoder.load(run.folder, device="cpu")
    texts = ["abc def", "a", "defghij abc abc de"]
    assert torch.equal(trained.encode_passages(texts), base.encode_passages(texts))
    for expert in (1, 2):
        choose_expert(trained, expert)
        assert not torch.allclose(trained.encode_passages(texts), base.encode_passages(texts), atol=1e-3)
    one = train(**options | more | {"experts_of_data": [2, 2], "output_dir": str(tmp_path / "one")})
    for _, parameter in expert_parameters(load_encoder(one.folder)[0]):
        assert torch.equal(parameter[0], parameter[1])
        assert not torch.equal(parameter[0], parameter[2])


def test_evaluation_says_which_expert(options, tmp_path):
    dev = make_collection(tmp_path / "dev")
    options |= {"save_strategy": "steps", "save_steps": 4, "dev_expert": 1, "learning_rate": 0.03}
    run = train(**options, dev_collection=dev, dev_language="ko")
    assert json.loads((run.folder / "config.json").read_text())["moe"]["expert"] == 1
    found = {}
    for expert in (None, 0, 1):
        evaluation = evaluate(
            model=[str(run.folder)],
            collection=str(dev),
            languages=["ko"],
            output=str(tmp_path / f"results{expert}"),
            cache_dir=str(tmp_path / "cache"),  # shared: no expert finds the embeddings of another
            expert=expert,
            query_max_len=24,
            passage_max_len=40,
            dtype="float32",
        )
        found[expert] = evaluation.results[0].metrics["nDCG@10"]
    assert found[None] == found[1] != found[0]
    of_dev = evaluate_retrieval(  # in 32 bits, as in training
        Encoder.load(run.folder, compute_dtype=torch.float32),
        Collection.load(dev, "ko", "dev"),
        EncodingArguments(24, 40),
        metrics=["nDCG@10"],
    )
    assert of_dev.metrics["nDCG@10"] == run.after["nDCG@10"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"experts_of_data": [1]}, "experts_of_data: found 1, expected one for each of train_data's 2"),
        ({"experts_of_data": None}, "experts_of_data: found none, expected one for each entry"),
        ({"experts_of_data": [1, 3]}, "experts_of_data: expert is 3: choose a number from 0 to 2"),
        ({"router": "random"}, "experts_of_data: the encoder has no experts with router given"),
        ({"dev_expert": 5}, "dev_expert: expert is 5"),
        ({"packing": False}, "experts_of_data: found padded batches, expected packing"),
        ({"weight_decay": 0.1}, "weight_decay: changes experts that no text goes to, expected 0"),
    ],
)
def test_experts_that_do_not_fit(options, tmp_path, more, message):
    with pytest.raises(UserError) as error:
        train(**options | more)
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()
