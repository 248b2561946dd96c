import random
from itertools import chain

import datasets
import pytest

from clpl_moe.common.text_key import text_id
from clpl_moe.data.near_copies import bands_of, mark_examples
from clpl_moe.data.sampler import EpochBatchSampler, plan_batches


def words(number, seed):
    rng = random.Random(seed)
    return ["".join(rng.choices("abcdefghijklmnop", k=6)) for _ in range(number)]


def share(one, other):
    return bool(set(bands_of(one).tolist()) & set(bands_of(other).tolist()))


def test_near_copies_share_a_band_and_other_texts_do_not():
    near = other = 0
    for seed in range(50):
        text = words(60, seed)
        changed = [*text[:30], "changed", *text[31:]]
        near += share(" ".join(text), " ".join(changed))
        other += share(" ".join(text), " ".join(words(60, seed + 1000)))
    assert near >= 45
    assert other == 0
    assert share("", "")
    assert share("한국어 글", "한국어\n글!")
    assert not share("ab", "cd")


def make_marks(lines):
    records = [
        {"query_id": text_id(q), "pos": pos, "pos_ids": list(map(text_id, pos)), "neg": ["n"]} for q, pos in lines
    ]
    return mark_examples(datasets.Dataset.from_list(records))


def test_marks_are_of_queries_and_positives():
    text = " ".join(words(60, 0))
    marks = make_marks(
        [("q", ["a"]), ("Q?", ["b"]), ("r", ["c", "b."]), ("a", ["d"]), ("s", [text]), ("t", [text + " more"])]
    )
    near = {(i, j) for i in range(6) for j in range(i) if marks[i] & marks[j]}
    assert near == {(1, 0), (2, 1), (5, 4)}


@pytest.mark.parametrize("parts", [[range(100)], [range(40), range(40, 100)]])
@pytest.mark.parametrize("size", [1, 4, 9])
def test_near_examples_never_meet_in_a_batch(parts, size):
    marks = make_marks([(f"q{i // 3}", [f"p{i}"]) for i in range(100)])
    plain, apart = (plan_batches(parts, size, 3, 1, marks=m) for m in (None, marks))
    assert sorted(map(len, apart)) == sorted(map(len, plain))
    assert sorted(chain(*apart)) == list(range(100))
    assert apart == plan_batches(parts, size, 3, 1, marks=marks)
    assert all(len({i // 3 for i in batch}) == len(batch) for batch in apart)
    assert size == 1 or not all(len({i // 3 for i in batch}) == len(batch) for batch in plain)


def test_where_all_are_near_each_other_every_example_comes():
    marks = make_marks([("q", [f"p{i}"]) for i in range(10)])
    assert sorted(chain(*plan_batches([range(10)], 4, 0, 0, marks=marks))) == list(range(10))
    assert len(plan_batches([range(10)], 4, 0, 0, drop_last=True, marks=marks)) == 2


def test_processes_share_such_batches():
    marks = make_marks([(f"q{i // 3}", [f"p{i}"]) for i in range(20)])
    one = list(EpochBatchSampler([20], 4, 3, marks=marks))
    both = [list(EpochBatchSampler([20], 2, 3, process_index=i, num_processes=2, marks=marks)) for i in (0, 1)]
    assert one == [first + second for first, second in zip(*both)]
