import math
import random
from collections import Counter

import pytest

from clpl_moe.mine.select import shuffled
from helpers.known_ranking import SCORES, found, make_index


@pytest.fixture
def index(tmp_path):
    return make_index(tmp_path)


@pytest.mark.parametrize("sampling", ["random", "score", "corpus"])
def test_draws_depend_on_the_seed_and_the_query_only(index, sampling):
    options = {"sampling": sampling, "negatives": 3} | ({"sampling_temperature": 0.1} if sampling == "score" else {})
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


def test_shuffled_numbers_are_a_permutation():
    for count in (1, 2, 7):
        numbers = list(shuffled(count, random.Random(0)))
        assert sorted(numbers) == list(range(count))
