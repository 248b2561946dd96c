import dataclasses
import inspect
import math
import subprocess
import sys

import pytest

from clpl_moe.loss import CachedSentenceTransformerCLPLLoss, CLPLLoss, CLPLOptions, SentenceTransformerCLPLLoss

NAMES = [field.name for field in dataclasses.fields(CLPLOptions)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature is 0"),
        ({"temperature": -0.02}, "choose a number above 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": "0.02"}, "temperature is 0.02"),
        ({"penalty_weight": -0.1}, "penalty_weight is -0.1"),
        ({"penalty_weight": 1.1}, "choose a number from 0 to 1"),
        ({"penalty_weight": math.nan}, "penalty_weight is nan"),
        ({"false_negative_margin": math.nan}, "false_negative_margin is nan"),
        ({"penalty": "cos"}, "choose one of cosine, contrastive"),
        ({"symmetric_weight": -1}, "symmetric_weight is -1"),
        ({"symmetric_weight": math.inf}, "symmetric_weight is inf"),
        ({"penalty_temperature": 0}, "penalty_temperature is 0"),
        ({"penalty_temperature": math.inf}, "penalty_temperature is inf"),
        ({"hardness_weight": -1}, "hardness_weight is -1"),
        ({"hardness_weight": math.nan}, "hardness_weight is nan"),
        ({"same_tower_negatives": True, "in_batch_negatives": False}, "set in_batch_negatives=True"),
        ({"gather_across_devices": True, "in_batch_negatives": False}, "set in_batch_negatives=True"),
        ({"matryoshka_dims": []}, "matryoshka_dims is \\[\\]: choose numbers of dimensions"),
        ({"matryoshka_dims": [8, 8]}, "each once"),
        ({"matryoshka_dims": [8, 0]}, "matryoshka_dims is \\[8, 0\\]"),
        ({"matryoshka_dims": [8.5]}, "matryoshka_dims is \\[8.5\\]"),
        ({"matryoshka_weights": [1]}, "matryoshka_weights belong to matryoshka_dims"),
        ({"matryoshka_dims": [8, 4], "matryoshka_weights": [1]}, "has 1: choose one for each of the 2"),
        ({"matryoshka_dims": [8, 4], "matryoshka_weights": [1, -1]}, "choose finite numbers"),
        ({"matryoshka_dims": [8, 4], "matryoshka_weights": [0, 0]}, "not only 0"),
        ({"matryoshka_dims": [8, 4], "matryoshka_weights": [1, math.inf]}, "choose finite numbers"),
    ],
)
@pytest.mark.parametrize("kind", [CLPLOptions, CLPLLoss])
def test_constructor_refuses(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


def test_the_constructors_take_each_option_two_by_place():
    parameters = inspect.signature(CLPLLoss).parameters
    assert list(parameters) == NAMES
    by_place = [name for name, p in parameters.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert by_place == ["temperature", "penalty_weight"]
    for kind, more in ((SentenceTransformerCLPLLoss, set()), (CachedSentenceTransformerCLPLLoss, {"mini_batch_size"})):
        in_trainer = inspect.signature(kind).parameters
        assert list(in_trainer)[:3] == ["model", *by_place]
        assert set(in_trainer) == {"model", "num_negatives", "query_prompt", *more, *NAMES}
        assert {in_trainer[name].default == parameters[name].default for name in NAMES} == {True}


def test_options_are_the_losss_attributes():
    loss = CLPLLoss(0.1, 1, symmetric_weight=2)
    assert {name: getattr(loss, name) for name in NAMES} == dataclasses.asdict(loss)
    assert repr(loss).startswith("CLPLLoss(temperature=0.1, penalty_weight=1.0, ")
    loss.penalty_weight = 0.25
    other = dataclasses.replace(loss, in_batch_negatives=False)
    assert (other.penalty_weight, other.symmetric_weight, other.in_batch_negatives) == (0.25, 2.0, False)
    assert loss.in_batch_negatives
    assert isinstance(other, CLPLLoss)
    with pytest.raises(ValueError, match="penalty_weight is 2"):
        dataclasses.replace(loss, penalty_weight=2)


def test_in_words():
    assert CLPLLoss(0.1, 0.3).in_words() == "temperature 0.1, penalty weight 0.3 (cosine), in-batch negatives on"
    loss = CLPLLoss(penalty="contrastive", equal_weights=True, same_tower_negatives=True, hardness_weight=5)
    expected = "temperature 0.02, equal weights (contrastive), in-batch negatives on"
    assert loss.in_words() == f"{expected}, same tower negatives on, hardness weight 5.0"
    assert CLPLLoss(matryoshka_dims=(8, 4)).in_words().endswith("negatives on, matryoshka dims 8 4")


def test_dimensions_are_held_against_the_models(caplog):
    CLPLOptions(matryoshka_dims=[8, 4]).check_dimensions(8)
    CLPLOptions().check_dimensions(8)
    assert not caplog.records
    CLPLOptions(matryoshka_dims=[4]).check_dimensions(8)
    assert "4 at most, and the embeddings 8 dimensions: whole embeddings are not trained" in caplog.text
    with pytest.raises(ValueError, match="found 16, expected at most 8"):
        CLPLOptions(matryoshka_dims=[16, 4]).check_dimensions(8)


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("from clpl_moe.loss.options import CLPLOptions", ["torch", "transformers", "sentence_transformers"]),
        ("from clpl_moe.loss import CLPLLoss; CLPLLoss()", ["transformers", "sentence_transformers", "FlagEmbedding"]),
    ],
)
def test_what_an_import_needs(statement, absent):
    blocked = "".join(f"sys.modules[{name!r}] = None; " for name in absent)
    subprocess.run([sys.executable, "-c", f"import sys; {blocked}{statement}"], check=True)
