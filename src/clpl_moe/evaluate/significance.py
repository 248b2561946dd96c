"""Whether one retriever is better than another: a paired test for each pair, corrected for the number of pairs.

1. For each pair, the differences of a metric, query by query.
2. Their paired two-sided randomisation test (Fisher's; recommended for retrieval by Smucker, Allan and Carterette, CIKM 2007,
   doi:10.1145/1321440.1321528). If neither is better, each difference is as likely with the other sign. p is the share of
   sign patterns whose mean difference is at least as large: among all 2^n patterns where these are at most ``resamples``,
   otherwise among that many random patterns and the observed one.
3. Holm's step-down correction (1979) over the pairs, so that the chance of any false alarm among them stays below the level.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from clpl_moe.evaluate.results import Result

RESAMPLES = 9_999
TEST = (
    f"two-sided paired randomisation test over the queries ({RESAMPLES:,} random sign patterns, or all where they are no"
    " more), p_holm: Holm's correction over the pairs of a language, score and metric"
)
_VALUES_AT_ONCE = 2**22


@dataclass(frozen=True)
class Comparison:
    """Two systems compared by one metric over the same queries.

    Attributes:
        queries: how many queries both have.
        difference: mean of the second minus mean of the first.
        better: for how many queries the second has the higher value; ``worse``: the lower one.
        p: of the two-sided randomisation test.
        p_holm: p corrected for the number of pairs; below 0.05, the difference counts as real.
    """

    first: str
    second: str
    queries: int
    difference: float
    better: int
    worse: int
    p: float
    p_holm: float


def compare(systems: Mapping[str, Mapping[str, float]]) -> list[Comparison]:
    """Test every pair of systems (name -> query id -> value of the metric), in their order; raises ValueError where they
    have different queries, or none."""
    ids = list(next(iter(systems.values()), {}))
    if not ids or any(set(values) != set(ids) for values in systems.values()):
        raise ValueError("systems can be compared over the same queries only, at least one")
    values = {name: np.array([of[query_id] for query_id in ids]) for name, of in systems.items()}
    pairs = list(combinations(values, 2))
    differences = [values[second] - values[first] for first, second in pairs]
    p = [randomisation_test(difference) for difference in differences]
    return [
        Comparison(*pair, len(ids), float(d.mean()), int((d > 0).sum()), int((d < 0).sum()), raw, corrected)
        for pair, d, raw, corrected in zip(pairs, differences, p, holm(p), strict=True)
    ]


def randomisation_test(differences: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """p of the two-sided paired randomisation test that the mean of ``differences`` (n,) is 0."""
    from scipy.stats import permutation_test

    # Those of 0 have no sign: without them p is the same, and exact for more queries.
    differences = differences[differences != 0]
    if len(differences) < 2:  # with one, half of the patterns lie as far out on either side
        return 1.0
    result = permutation_test(
        (differences,),
        lambda x, axis: x.mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _VALUES_AT_ONCE // len(differences)),
        rng=seed,
    )
    return float(result.pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's corrected p-values, in the order of ``p``: the i-th smallest of m is multiplied by m - i + 1, none falls below
    one before it, and none exceeds 1."""
    factors = np.arange(len(p), 0, -1)
    order = np.argsort(p, kind="stable")
    corrected = np.empty(len(p))
    corrected[order] = np.maximum.accumulate(np.minimum(np.asarray(p)[order] * factors, 1))
    return corrected.tolist()


def compare_results(results: Sequence[Result], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Compare every pair of models by each metric, in each language and kind of score that both have."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.language, result.score), []).append(result)
    return [
        {"language": language, "score": score, "metric": metric, **dataclasses.asdict(comparison)}
        for (language, score), own in groups.items()
        for metric in metrics
        for comparison in compare({r.label: {q: v[metric] for q, v in r.per_query.items()} for r in own})
    ]
