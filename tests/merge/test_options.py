import pytest

from clpl_moe.common.errors import OptionError
from clpl_moe.merge import MergeArguments


@pytest.mark.parametrize(
    ("options", "alphas"),
    [
        ({}, [1.0]),
        ({"base": "b"}, [0.5]),
        ({"base": "b", "alpha": [0.3]}, [0.3]),
        ({"base": "b", "collection": "c", "languages": ["ko"]}, [0.0, 0.25, 0.5, 0.75, 1.0]),
        ({"base": "b", "alpha": [0.7, 0.2], "collection": "c", "languages": ["ko"]}, [0.0, 0.2, 0.7]),
    ],
)
def test_the_base_is_a_candidate_where_there_are_several(options, alphas):
    assert MergeArguments("in", "out", **options).alphas == alphas


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"input": None}, "input: found nothing, expected a folder"),
        ({"output": None}, "output: found nothing"),
        ({"output": "./in"}, "output: found the folder of input"),
        ({"base": "b/../out"}, "output: found the folder of base"),
        ({"alpha": [0.5]}, "alpha: mixes with the weights of a base model, expected base"),
        ({"base_revision": "v1"}, "base_revision: found no base"),
        ({"base": ".", "base_revision": "v1"}, "base_revision: . is a folder here, which has none"),
        ({"base": "b", "alpha": [1.5]}, "alpha: found 1.5, expected at most 1"),
        ({"base": "b", "alpha": [float("nan")]}, "alpha: found nan"),
        ({"base": "b", "alpha": [0.1, 0.2]}, "alpha: found several, expected one, or a collection"),
        ({"collection": "c"}, "languages: expected with collection"),
        ({"languages": ["ko"]}, "languages: expected with collection"),
        ({"weights": "load"}, "weights: load is measured on texts, expected a collection"),
    ],
)
def test_options_that_do_not_fit_together(options, fault):
    with pytest.raises(OptionError) as error:
        MergeArguments(**{"input": "in", "output": "out"} | options)
    assert fault in str(error.value)
