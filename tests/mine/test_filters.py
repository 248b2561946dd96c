from collections import Counter

import pytest

from clpl_moe.mine.filters import highest_score
from clpl_moe.mine.index import PassageIndex
from clpl_moe.mine.options import SelectionArguments
from clpl_moe.retrieval.collection import Collection
from helpers.known_ranking import SCORES, found, make_index
from helpers.mining import make_collection


@pytest.fixture
def index(tmp_path):
    return make_index(tmp_path)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0, 1, 3, 4, 5, 6, 7, 8, 9]),
        ({"max_positive_ratio": 1}, [3, 4, 5, 6, 7, 8, 9]),
        ({"max_positive_ratio": 0.95}, [6, 7, 8, 9]),  # at most 0.836
        ({"margin": 0.0}, [3, 4, 5, 6, 7, 8, 9]),
        ({"margin": 0.035}, [5, 6, 7, 8, 9]),
        ({"margin": 0.035, "max_positive_ratio": 0.9}, [7, 8, 9]),  # the narrower of both
        ({"positives": (2, 7)}, [0, 1, 3, 4, 5, 6, 8, 9]),
        ({"positives": (2, 7), "max_positive_ratio": 0.95}, [8, 9]),  # of the lowest positive
        ({"positives": (2, 7), "max_positive_ratio": 0.95, "positive_score": "mean"}, [8, 9]),  # at most 0.75
        ({"positives": (2, 7), "margin": -0.02, "positive_score": "mean"}, [6, 8, 9]),  # at most 0.81
        ({"positives": (2, 7), "max_positive_ratio": 0.95, "positive_score": "highest"}, [6, 8, 9]),  # at most 0.836
        ({"excluded": (3, 6)}, [0, 1, 4, 5, 7, 8, 9]),
        ({"rank_from": 3, "rank_to": 5, "negatives": 2}, [3, 4]),
    ],
)
def test_which_passages_may_be_negatives(index, options, expected):
    counts = Counter()
    (mined,) = found(index, counts=counts, **options)
    assert mined.places == expected
    assert mined.scores == pytest.approx([SCORES[p] for p in expected])
    if "max_positive_ratio" in options or "margin" in options:
        left_out = 10 - len(options.get("positives", (2,))) - len(expected)
        assert counts["passages left out: nearly as similar as a positive"] == left_out


def test_ratio_of_a_score_below_zero_is_below_it():
    """95% of a reranker's -2 would be above it."""
    assert highest_score([3.0, -2.0], SelectionArguments(max_positive_ratio=0.95)) == pytest.approx(-2.1)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_copies_of_a_positive_are_passed_over(index, tmp_path):
    story = "the tower was finished in the year 1889 and is painted every seven years"
    passages = {
        "whole": story,
        "longer": f"An introduction comes first. {story}. Then more is told of it, at some length.",
        "part": story[: len(story) // 2],
        "reworded": "the bridge was finished in the year 1932 and is painted every two years",
    }
    index = PassageIndex(Collection.load(make_collection(tmp_path / "story", passages=passages), "ko", "train"))
    for overlap, expected in ((1, {1, 2, 3}), (0.8, {3})):
        counts = Counter()
        (mined,) = found(index, positives=(0,), sampling="corpus", negatives=3, max_overlap=overlap, counts=counts)
        assert set(mined.places) == expected
        assert counts["passages left out: nearly the same text as a positive"] == 3 - len(expected)
