import numpy as np
import pytest
from scipy import stats

from clpl_moe.evaluate.significance import compare, holm, randomisation_test


def test_exact_test_by_hand():
    # Of the 8 sign patterns of 1, 2, 3 only +++ and --- have a mean as far out.
    assert randomisation_test(np.array([1.0, 2.0, 3.0])) == pytest.approx(2 / 8)
    # Of -1, 2, 3 (sum 4) these do: sums 6, 4, -4, -6.
    assert randomisation_test(np.array([-1.0, 2.0, 3.0])) == pytest.approx(4 / 8)
    # Differences of 0 have no sign.
    assert randomisation_test(np.array([1.0, 0.0, 2.0, 0.0, 3.0])) == pytest.approx(2 / 8)
    assert randomisation_test(np.array([0.0, 0.0])) == 1
    assert randomisation_test(np.array([0.5])) == 1


def test_random_patterns_agree_with_all_of_them_and_with_the_t_test():
    differences = np.random.default_rng(0).normal(0.1, 0.2, size=11)
    exact = randomisation_test(differences, resamples=2**11)
    assert randomisation_test(differences, resamples=2**11 - 1, seed=1) == pytest.approx(exact, abs=0.03)
    many = np.random.default_rng(0).normal(0.05, 0.2, size=50)
    assert randomisation_test(many) == pytest.approx(stats.ttest_1samp(many, 0).pvalue, abs=0.015)
    assert randomisation_test(many) == randomisation_test(many)
    assert randomisation_test(-many) == pytest.approx(randomisation_test(many), abs=0.01)
    assert randomisation_test(many + 1) == pytest.approx(2 / 10_000)  # the least that 9,999 patterns can give


def test_p_is_uniform_where_there_is_no_difference():
    rng = np.random.default_rng(3)
    p = [randomisation_test(rng.normal(size=40), resamples=299) for _ in range(100)]
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_holm_by_hand():
    # 4 * 0.005, 3 * 0.01, 2 * 0.03, and 1 * 0.04, which may not fall below the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


def test_compare():
    rng = np.random.default_rng(0)
    base = {f"q{i}": float(value) for i, value in enumerate(rng.random(60))}
    better = {q: v + 0.1 for q, v in base.items()}
    mixed = {q: v + rng.normal(0, 0.1) for q, v in reversed(base.items())}  # the order does not count
    systems = {"base": base, "better": better, "mixed": mixed}
    found = compare(systems)
    assert [(c.first, c.second) for c in found] == [("base", "better"), ("base", "mixed"), ("better", "mixed")]
    assert found[0].difference == pytest.approx(0.1)
    assert (found[0].queries, found[0].better, found[0].worse) == (60, 60, 0)
    assert found[1].better == sum(mixed[q] > base[q] for q in base) == 60 - found[1].worse
    assert [c.p_holm for c in found] == holm([c.p for c in found])
    assert found[0].p_holm < 0.01 < 0.05 < found[1].p_holm
    assert compare({"only": base}) == []
    with pytest.raises(ValueError, match="same queries"):
        compare({"a": base, "b": {"q0": 1.0}})
    with pytest.raises(ValueError, match="at least one"):
        compare({})
