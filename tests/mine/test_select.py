import math
import random
from collections import Counter

import pytest
import torch

from clpl_moe.common.errors import UserError
from clpl_moe.mine import select
from clpl_moe.mine.index import PassageIndex
from clpl_moe.mine.select import MiningQuery, Ranking, SelectionArguments, mine_negatives
from clpl_moe.retrieval.collection import Collection
from clpl_moe.retrieval.options import EncodingArguments
from helpers.mining import make_collection

# Passages by their scores: a ranking that is known, instead of an encoder.
SCORES = [0.9, 0.89, 0.88, 0.86, 0.85, 0.84, 0.8, 0.7, 0.6, 0.5]
TEXTS = [
    " ".join([word] * 6)
    for word in ("alpha", "gamma", "kilo", "mike", "oscar", "romeo", "tango", "victor", "xray", "zulu")
]
PLAIN = {"rank_from": 1, "rank_to": 10, "negatives": 10, "max_positive_ratio": 0, "max_overlap": 1}


@pytest.fixture
def index(tmp_path):
    passages = {f"p{i}": text for i, text in enumerate(TEXTS)}
    return PassageIndex(Collection.load(make_collection(tmp_path, passages=passages), "ko", "train"))


@pytest.fixture(autouse=True)
def ranking(monkeypatch):
    def rank(queries, *_, **__):
        places = torch.arange(10).repeat(len(queries), 1)
        return Ranking(torch.tensor(SCORES)[places], places, [[SCORES[p] for p in q.positives] for q in queries])

    monkeypatch.setattr(select, "rank_passages", rank)


def found(index, *, positives=(2,), excluded=(), keys=("q",), seed=0, reranker=None, counts=None, **options):
    queries = [MiningQuery(key, "?", list(positives), {*positives, *excluded}) for key in keys]
    mined = mine_negatives(
        queries,
        index,
        SelectionArguments(**PLAIN | options),
        encoder=None,
        encoding=EncodingArguments(),
        seed=seed,
        counts=Counter() if counts is None else counts,
        reranker=reranker,
    )
    return list(mined)


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
    assert SelectionArguments(max_positive_ratio=0.95).ceiling([3.0, -2.0]) == pytest.approx(-2.1)


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


@pytest.mark.parametrize("sampling", ["random", "score", "corpus"])
def test_draws_depend_on_the_seed_and_the_query_only(index, sampling):
    options = {"sampling": sampling, "negatives": 3, "sampling_temperature": 0.1}
    both = found(index, keys=("a", "b"), **options)
    (alone,) = found(index, keys=("b",), **options)
    assert both[1] == alone
    assert both[0] != both[1]
    assert found(index, keys=("b",), seed=1, **options) != [alone]
    if sampling != "corpus":
        assert alone.places == sorted(alone.places)
        assert alone.scores == pytest.approx([SCORES[p] for p in alone.places])
    else:
        assert (alone.scores, alone.positive_scores) == (None, None)


def test_draws_by_score_have_softmax_probabilities(index):
    keys = [str(i) for i in range(4000)]
    mined = found(index, keys=keys, sampling="score", negatives=1, sampling_temperature=0.1)
    seen = Counter(m.places[0] for m in mined)
    weights = {p: math.exp(s / 0.1) for p, s in enumerate(SCORES) if p != 2}
    for place, weight in weights.items():
        assert seen[place] / len(keys) == pytest.approx(weight / sum(weights.values()), abs=0.03)


def test_whole_corpus_is_drawn_from_evenly_and_to_its_end(index):
    keys = [str(i) for i in range(2000)]
    mined = found(index, keys=keys, sampling="corpus", negatives=3, rank_to=1)
    seen = Counter(p for m in mined for p in m.places)
    assert set(seen) == set(range(10)) - {2}
    assert max(seen.values()) < 1.2 * min(seen.values())
    (everything,) = found(index, sampling="corpus", negatives=100)
    assert sorted(everything.places) == [p for p in range(10) if p != 2]


def test_reranker_orders_the_window_and_the_limits_go_by_its_scores(index):
    class Backwards:
        """Likes later passages better; the positive gets 0.5."""

        def scores(self, pairs, cache):
            assert all(query == "?" for query, _ in pairs)
            places = [TEXTS.index(text) for _, text in pairs]
            return [0.5 if p == 2 else p / 10 for p in places]

    options = {"reranker": Backwards(), "rank_to": 6, "negatives": 2}
    (mined,) = found(index, **options)
    assert mined.places == [6, 5]  # ranked 2 to 7 by the encoder, since the positive has no rank
    assert mined.scores == [0.6, 0.5]
    assert mined.positive_scores == [0.5]
    (mined,) = found(index, rank_from=2, **options)
    assert mined.places == [5, 4]
    (mined,) = found(index, max_positive_ratio=0.95, **options)
    assert mined.places == [4, 3]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_positive_ratio": -0.1}, "--max_positive_ratio: found -0.1"),
        ({"margin": math.nan}, "--margin: found nan"),
        ({"max_overlap": 0}, "--max_overlap: found 0"),
        ({"sampling_temperature": 0}, "--sampling_temperature: found 0"),
    ],
)
def test_ill_defined_options(options, words):
    with pytest.raises(UserError, match=words):
        SelectionArguments(**options)


def test_shuffled_numbers_are_a_permutation():
    for count in (1, 2, 7):
        numbers = list(select._shuffled(count, random.Random(0)))
        assert sorted(numbers) == list(range(count))
