import pytest

from helpers.ablation import TRAIN, make_collection


@pytest.fixture
def configuration(tiny_encoder, tmp_path):
    """A comparison of the base model, a dense training and one with experts, on one language and two seeds."""
    lengths = {"query_max_len": 20, "passage_max_len": 20}
    return {
        "model": str(tiny_encoder),
        "languages": {"ko": {"collection": str(make_collection(tmp_path / "data"))}},
        "seeds": [1, 2],
        "mine": {"negatives": 3, "rank_to": 10, **lengths},
        "evaluate": {"top_k": 10, **lengths},
        "train": TRAIN,
        "rows": {
            "base": {"label": "Base model", "train": False},
            "dense": {"train": {"num_experts": 0, "trainable": "full"}},
            "experts": {"train": {"learning_rate": 1e-3}, "seeds": [1]},
        },
        "runs": str(tmp_path / "runs"),
        "output": str(tmp_path / "results" / "ablation.json"),
    }
