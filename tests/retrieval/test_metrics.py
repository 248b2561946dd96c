import math
import random

import ir_measures
import numpy as np
import pytest

from clpl_moe.errors import UserError
from clpl_moe.retrieval.metrics import check_metrics, evaluate_run, write_trec_run

NAMES = ("nDCG@5", "nDCG@10", "R@100", "RR@10", "AP")


def random_run(seed=0, ties=False):
    rng = random.Random(seed)
    qrels = {f"q{q}": {f"p{p}": rng.choice([0, 1, 2]) for p in rng.sample(range(60), 8)} for q in range(12)}
    run = {
        f"q{q}": {
            f"p{p}": rng.randrange(5) / 4 if ties else float(np.float32(rng.random()))
            for p in rng.sample(range(60), 40)
        }
        for q in range(2, 12)
    }
    return qrels, run


@pytest.mark.parametrize("ties", [False, True])
def test_equals_ir_measures_and_survives_the_run_file(tmp_path, ties):
    qrels, run = random_run(ties=ties)
    means, per_query = evaluate_run(qrels, run, NAMES)
    measures = [ir_measures.parse_measure(name) for name in NAMES]
    write_trec_run(tmp_path / "run.trec", run, "a model")
    for given in (run, list(ir_measures.read_trec_run(str(tmp_path / "run.trec")))):
        expected = ir_measures.calc(measures, qrels, given)
        assert means == {str(m): v for m, v in expected.aggregated.items()}
        for value in expected.per_query:
            assert per_query[value.query_id][str(value.measure)] == value.value


def test_values_by_hand():
    qrels = {"q": {"a": 1, "b": 1}}
    means, per_query = evaluate_run(qrels, {"q": {"x": 0.9, "a": 0.8, "y": 0.7, "b": 0.6}}, ["nDCG@5", "R@3"])
    ndcg = (1 / math.log2(3) + 1 / math.log2(5)) / (1 + 1 / math.log2(3))
    assert means == pytest.approx({"nDCG@5": ndcg, "R@3": 0.5})
    assert per_query == {"q": pytest.approx({"nDCG@5": ndcg, "R@3": 0.5})}


def test_queries_as_trec_eval_counts_them():
    qrels = {"found": {"a": 1}, "missing": {"a": 1}, "none relevant": {"a": 0}, "not in corpus": {"gone": 1}}
    run = {q: {"a": 1.0} for q in ("found", "none relevant", "not in corpus", "not judged")}
    means, per_query = evaluate_run(qrels, run, ["nDCG@5"])
    assert per_query["missing"] == {"nDCG@5": 0.0}
    assert set(per_query) == set(qrels)
    assert means == {"nDCG@5": 0.25}


def test_ties_are_ranked_by_descending_id(tmp_path):
    # Equal as 32-bit floats, though not as Python's.
    run = {"q": {"c": 0.5, "b": 0.5 + 1e-12, "a": 0.5 + 1e-13, "z": 0.25}}
    assert evaluate_run({"q": {"c": 1}}, run, ["nDCG@1"])[0] == {"nDCG@1": 1.0}
    assert evaluate_run({"q": {"a": 1}}, run, ["nDCG@5"])[0] == {"nDCG@5": pytest.approx(0.5)}
    write_trec_run(tmp_path / "run.trec", run, "m")
    qrels, names = {"q": {"b": 1}}, ["RR@10", "nDCG@5"]
    back = {"q": {r.doc_id: r.score for r in ir_measures.read_trec_run(str(tmp_path / "run.trec"))}}
    assert evaluate_run(qrels, run, names) == evaluate_run(qrels, back, names)
    lines = [line.split() for line in (tmp_path / "run.trec").read_text().splitlines()]
    assert [(line[2], line[3]) for line in lines] == [("c", "1"), ("b", "2"), ("a", "3"), ("z", "4")]
    assert all(line[0] == "q" and line[1] == "Q0" and line[5] == "m" for line in lines)


def test_scores_are_read_back_exactly(tmp_path):
    values = np.random.default_rng(0).normal(size=500).astype(np.float32)
    write_trec_run(tmp_path / "run.trec", {"q": {f"p{i}": float(v) for i, v in enumerate(values)}}, "m")
    back = {r.doc_id: np.float32(r.score) for r in ir_measures.read_trec_run(str(tmp_path / "run.trec"))}
    assert all(back[f"p{i}"] == value for i, value in enumerate(values))


@pytest.mark.parametrize("name", ["ndcg@5", "nDCG@0", "nDCG@x", "R", "", "accuracy"])
def test_unknown_metric(name):
    with pytest.raises(UserError, match="expected names such as nDCG@10"):
        check_metrics(["nDCG@5", name])
