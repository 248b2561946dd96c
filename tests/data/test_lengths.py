import subprocess
import sys

import pytest

from clpl_moe.data.lengths import cut_off, fitting, percent, token_counter


def test_what_a_limit_cuts_off():
    assert cut_off([3, 8, 9, 20], 8) == (2, 13)
    assert cut_off([], 8) == (0, 0)


@pytest.mark.parametrize(("share", "limit"), [(1.0, 104), (0.95, 96), (0.5, 56), (0.01, 8)])
def test_a_limit_that_fits_is_a_multiple_of_8(share, limit):
    lengths = list(range(1, 101))
    assert fitting(lengths, share) == limit
    assert cut_off(lengths, limit)[0] <= (1 - share) * 100


def test_special_tokens_count_and_counting_stops(tiny_tokenizer):
    assert token_counter(tiny_tokenizer)(["abc", ""]) == [5, 2]
    assert token_counter(tiny_tokenizer, 4)(["abc", "a", "a b " * 50_000]) == [4, 3, 4]
    assert token_counter(tiny_tokenizer)([]) == []


@pytest.mark.parametrize(("part", "shown"), [(0, "0%"), (1, "0.1%"), (500, "5.0%"), (9_999, "99.9%"), (10_000, "100%")])
def test_a_share_for_people(part, shown):
    assert percent(part, 10_000) == shown
    assert percent(0, 0) == "0%"


def test_validation_needs_no_training_library():
    code = "import clpl_moe.validate, sys; assert not {'FlagEmbedding', 'torch', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
