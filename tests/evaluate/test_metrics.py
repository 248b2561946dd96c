import math
import random
import subprocess
import sys

import ir_measures
import numpy as np
import pytest
import pytrec_eval

from clpl_moe.common.errors import UserError
from clpl_moe.evaluate.metrics import (
    EVALUATION_METRICS,
    M3_SCORES,
    check_metrics,
    evaluate_run,
    read_trec_run,
    run_file,
    write_trec_qrels,
    write_trec_run,
)
from clpl_moe.retrieval.collection import Collection

NAMES = EVALUATION_METRICS
# Each of them in trec_eval, which has no reciprocal rank with a cut-off.
TREC_EVAL = {
    "nDCG@5": "ndcg_cut_5",
    "nDCG@10": "ndcg_cut_10",
    "nDCG@20": "ndcg_cut_20",
    "R@100": "recall_100",
    "R@1000": "recall_1000",
    "RR": "recip_rank",
    "AP": "map",
}


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


def awkward_run():
    """Ties (also across the cut-offs and with relevant passages), negative and large grades, and each odd query."""
    rng = random.Random(7)
    qrels, run = random_run(seed=1, ties=True)
    qrels |= {
        "no results": {"p1": 1},
        "none relevant": {"p1": 0, "p2": -1},
        "relevant ones not in the corpus": {"gone": 1, "lost": 2},
        "one of two not in the corpus": {"p1": 1, "gone": 1},
        "all tied": {f"p{i}": int(i % 7 == 0) for i in range(50)},
        "graded": {f"p{i}": i for i in range(-1, 4)},
        "한국어 질문": {"위키#1": 1, "فارسی": 2},
    }
    passages = {f"p{i}": rng.random() for i in range(50)}
    for query_id in ("none relevant", "relevant ones not in the corpus", "one of two not in the corpus", "graded"):
        run[query_id] = passages
    run["all tied"] = dict.fromkeys(passages, 0.25)
    run["한국어 질문"] = {"p1": 0.5, "فارسی": 0.5, "위키#1": 0.5, "p2": 0.4}
    run["not judged"] = passages
    spaces = {query_id: query_id.replace(" ", "_") for query_id in (*qrels, *run)}
    return {spaces[q]: v for q, v in qrels.items()}, {spaces[q]: v for q, v in run.items()}


def test_equals_trec_eval(tmp_path):
    qrels, run = awkward_run()
    means, per_query = evaluate_run(qrels, run, list(TREC_EVAL))
    write_trec_run(tmp_path / "run.trec", run, "m")
    write_trec_qrels(tmp_path / "qrels.trec", qrels)
    with (tmp_path / "qrels.trec").open() as file:
        evaluator = pytrec_eval.RelevanceEvaluator(pytrec_eval.parse_qrel(file), set(TREC_EVAL.values()))
    with (tmp_path / "run.trec").open() as file:
        expected = evaluator.evaluate(pytrec_eval.parse_run(file))
    assert set(per_query) == set(qrels)
    assert set(per_query) - set(expected) == {"q0", "q1", "no_results"}
    for query_id, values in per_query.items():
        own = expected.get(query_id) or dict.fromkeys(TREC_EVAL.values(), 0.0)
        assert values == {name: own[of] for name, of in TREC_EVAL.items()}, query_id
    # trec_eval -c: over all queries of the qrels.
    for name in TREC_EVAL:
        assert means[name] == pytest.approx(sum(v[name] for v in per_query.values()) / len(qrels), abs=1e-15)
    for query_id in ("no_results", "none_relevant", "relevant_ones_not_in_the_corpus"):
        assert set(per_query[query_id].values()) == {0.0}
    assert per_query["one_of_two_not_in_the_corpus"]["R@100"] == 0.5
    assert 0 < per_query["all_tied"]["nDCG@5"] < 1


def test_equals_ir_measures_on_the_written_files(tmp_path):
    qrels, run = awkward_run()
    means, per_query = evaluate_run(qrels, run, NAMES)
    write_trec_run(tmp_path / "run.trec", run, "m")
    write_trec_qrels(tmp_path / "qrels.trec", qrels)
    files = [str(tmp_path / "qrels.trec"), str(tmp_path / "run.trec")]
    expected = ir_measures.calc(
        [ir_measures.parse_measure(name) for name in NAMES],
        ir_measures.read_trec_qrels(files[0]),
        ir_measures.read_trec_run(files[1]),
    )
    assert means == {str(measure): value for measure, value in expected.aggregated.items()}
    values = {(v.query_id, str(v.measure)): v.value for v in expected.per_query}
    assert {(q, name): v for q, own in per_query.items() for name, v in own.items()} == values
    assert evaluate_run(qrels, read_trec_run(files[1]), NAMES) == (means, per_query)
    printed = subprocess.run(
        [sys.executable, "-m", "ir_measures", *files, *NAMES, "-p", "17"], capture_output=True, text=True, check=True
    ).stdout
    assert {line.split()[0]: float(line.split()[1]) for line in printed.splitlines()} == means


def test_reciprocal_rank_with_a_cut_off_is_that_of_ms_marco():
    # Equal scores by ascending id, where trec_eval has descending ones.
    run = {"q": {"a": 0.5, "b": 0.5, "c": 0.25}}
    assert evaluate_run({"q": {"a": 1}}, run, ["RR@10", "RR"])[0] == {"RR@10": 1.0, "RR": 0.5}


def test_reading_a_run(tmp_path):
    path = tmp_path / "run.trec"
    run = {"q1": {"a": 0.1, "b": 0.5}, "q2": {"c": -1.0}}
    write_trec_run(path, run, "m")
    assert read_trec_run(path) == {"q1": {"b": pytest.approx(0.5), "a": pytest.approx(0.1)}, "q2": {"c": -1.0}}
    assert list(read_trec_run(path)["q1"]) == ["b", "a"]
    path.write_text("q Q0 a 1 0.5 m\nq Q0 b 2 high m\n")
    with pytest.raises(UserError, match=r"run\.trec:2: found 'q Q0 b 2 high m', expected"):
        read_trec_run(path)
    path.write_text("q Q0 a 1 0.5 m\nq Q0 b\0 2 0.4 m\n")
    with pytest.raises(UserError, match=r"run\.trec:2: found 'q Q0 b\\x00 2 0.4 m', expected"):
        read_trec_run(path)
    path.write_text("q Q0 a 1 0.5 m\nr Q0 a 1 0.5 m\nq Q0 a 2 0.4 m\n")
    with pytest.raises(UserError, match=r"run\.trec:3: the passage 'a' stands twice for the query 'q'"):
        read_trec_run(path)


def test_a_run_of_another_collection_is_refused(tmp_path):
    qrels = {"q": {"a": 1}}
    collection = Collection(tmp_path, "ko", "dev", ["a", "b"], ["x", "y"], ["q"], ["z"], qrels)
    path = tmp_path / "run.trec"
    path.write_text("q Q0 a 1 0.5 m\n\nq Q0 b 2 0.4 m\n")
    assert read_trec_run(path, collection) == {"q": {"a": 0.5, "b": 0.4}}
    path.write_text("q Q0 a 1 0.5 m\n\nq Q0 pb 2 0.4 m\n")
    with pytest.raises(UserError, match=r"run\.trec:3: found 'pb', expected the id of a passage of .*/ko$"):
        read_trec_run(path, collection)
    path.write_text("q Q0 a 1 0.5 m\nqq Q0 b 2 0.4 m\n")
    with pytest.raises(UserError, match=r"run\.trec:2: found 'qq', expected the id of a query of .*/ko$"):
        read_trec_run(path, collection)


def test_two_names_of_one_measure_both_have_its_values():
    means, per_query = evaluate_run({"q": {"a": 1}}, {"q": {"b": 0.9, "a": 0.5}}, ["RR@10", "MRR@10", "AP", "MAP"])
    assert means == per_query["q"] == dict.fromkeys(["RR@10", "MRR@10", "AP", "MAP"], 0.5)


def test_each_kind_of_score_has_a_run_file():
    assert run_file("dense") == "run.trec"
    assert len({run_file(score) for score in ("dense", *M3_SCORES)}) == 5


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


@pytest.mark.parametrize("name", ["ndcg@5", "nDCG@0", "nDCG@x", "R", "", "accuracy", "ERR@10"])
def test_unknown_metric(name):
    with pytest.raises(UserError, match="expected names such as nDCG@10"):
        check_metrics(["nDCG@5", name])


def test_a_run_with_a_space_that_does_not_break_in_an_id(tmp_path):
    """TREC separates fields by ASCII's white space only."""
    run = {"q\u00a01": {"a\u00a0b": 2.0, "c\u3000d": 1.0}}
    write_trec_run(tmp_path / "run.trec", run, tag="x")
    assert read_trec_run(tmp_path / "run.trec") == run
    assert evaluate_run({"q\u00a01": {"c\u3000d": 1}}, run, ["RR@10"])[0] == {"RR@10": 0.5}
