import contextlib
import json
import re
import signal
import subprocess
import sys

import pytest
import torch

from clpl_moe.common.errors import UserError
from clpl_moe.common.files import read_jsonl
from clpl_moe.data.schema import find_faults
from clpl_moe.encoder import Encoder
from clpl_moe.mine import Mined, mine
from clpl_moe.mine.__main__ import main as mine_command
from clpl_moe.retrieval.options import open_encoder
from helpers.mining import PASSAGES, QUERIES, make_collection
from helpers.mining import mine_by_command as run


def test_called_from_python(tiny_encoder, tmp_path, capsys):
    folder = make_collection(tmp_path)
    by_command = run(tiny_encoder, folder)
    capsys.readouterr()
    options = {"model": tiny_encoder, "collection": folder, "language": "ko", "output": tmp_path / "from_python.jsonl"}
    limits = {"rank_from": 1, "rank_to": 8, "negatives": 4, "max_positive_ratio": 0, "max_overlap": 1}
    mined = mine(**options, **limits, passage_max_len=100, dtype="float32")
    assert isinstance(mined, Mined)
    assert mined.path == tmp_path / "from_python.jsonl"
    assert [record for _, record in read_jsonl(mined.path)] == list(by_command.values())
    assert mined.counts["negatives"] == 4 * len(QUERIES)
    assert "negatives" not in capsys.readouterr().out
    with pytest.raises(UserError, match="rank_from: found 9 with rank_to 8"):
        mine(**options, rank_from=9, rank_to=8)


@pytest.mark.parametrize("kind", ["int8", "binary"])
def test_quantized_search_finds_the_same_where_all_is_scored_again(tiny_encoder, tmp_path, kind):
    folder = make_collection(tmp_path)
    exact = run(tiny_encoder, folder)
    found = run(tiny_encoder, folder, quantize=kind, oversampling=100, overwrite=True)
    for key, line in exact.items():
        assert found[key]["neg_scores"] == pytest.approx(line["neg_scores"], abs=2e-6)
        assert {**found[key], "neg_scores": None} == {**line, "neg_scores": None}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_line_at_all_is_refused_with_the_reasons(tiny_encoder, tmp_path, capsys):
    folder = make_collection(tmp_path, qrels={"q0": {"p0": 0}})
    with pytest.raises(SystemExit):
        run(tiny_encoder, folder)
    err = capsys.readouterr().err
    assert "could be given negatives (queries: 6; queries dropped: no relevant passage in the corpus: 6)" in err


def test_a_query_is_not_its_own_negative(tiny_encoder, tmp_path):
    """Where queries are passages, too, as in some sets of BEIR."""
    queries = {"x1": "about apple and brick", "x2": "about cloud"}
    passages = PASSAGES | {"x1": "A title about apple and brick", "x2": "another text"}
    folder = make_collection(tmp_path, passages, queries, {"x1": {"p0": 1}, "x2": {"p2": 1}})
    lines = run(tiny_encoder, folder, rank_to=len(passages), negatives=len(passages))
    assert "x1" not in lines["x1"]["neg_ids"]
    assert {"x1", "x2"} <= set(lines["x2"]["neg_ids"])  # the id alone says nothing


def test_a_passage_with_the_text_of_the_query_is_no_negative_of_it(tiny_encoder, tmp_path):
    """Under any id, and though the bytes differ."""
    passages = PASSAGES | {"copy": "What about\nAPPLE?"}
    lines = run(tiny_encoder, make_collection(tmp_path, passages), rank_to=len(passages), negatives=len(passages))
    assert {key: "copy" in line["neg_ids"] for key, line in lines.items()} == {key: key != "q0" for key in QUERIES}


def test_each_process_has_its_gpu_before_a_model_is_loaded(tiny_encoder, tmp_path, monkeypatch):
    """Else all would lie on the first one."""
    order = []

    @contextlib.contextmanager
    def processes():
        order.append("processes")
        yield True

    def opened(*arguments):
        order.append("encoder")
        return open_encoder(*arguments)

    monkeypatch.setattr("clpl_moe.retrieval.store.processes", processes)
    monkeypatch.setattr("clpl_moe.mine.open_encoder", opened)
    run(tiny_encoder, make_collection(tmp_path))
    assert order == ["processes", "encoder"]


def rank_by_hand(model, query):
    """Passage ids and cosines, best first."""
    encoder = Encoder.load(model, compute_dtype=torch.float32)
    options = {"max_length": 100, "progress": False}
    passages = encoder.encode_passages(list(PASSAGES.values()), **options)
    scores = encoder.encode_queries([query], **options) @ passages.T
    return sorted(zip(scores[0].tolist(), PASSAGES), reverse=True)


def test_lines_hold_the_most_similar_passages_that_are_not_positives(tiny_encoder, tmp_path):
    records = run(tiny_encoder, make_collection(tmp_path))
    assert list(records) == list(QUERIES)
    for query_id, record in records.items():
        assert not list(find_faults(record, scores_required=True))
        ranked = rank_by_hand(tiny_encoder, QUERIES[query_id])
        (positive,) = record["pos_ids"]
        assert positive == f"p{query_id[1:]}"
        others = [(score, passage) for score, passage in ranked if passage != positive]
        # Embeddings are kept in 16 bits: passages that are nearly equally similar may change places.
        assert record["neg_scores"] == pytest.approx([score for score, _ in others[:4]], abs=2e-3)
        score_of = {passage: score for score, passage in others}
        assert record["neg_scores"] == pytest.approx([score_of[p] for p in record["neg_ids"]], abs=2e-3)
        assert record["pos_scores"] == pytest.approx([s for s, p in ranked if p == positive], abs=2e-3)
        assert record["query"] == QUERIES[query_id]
        assert record["pos"] == [PASSAGES[positive]]
        assert record["neg"] == [PASSAGES[p] for p in record["neg_ids"]]
        known = {f"p{i}": [QUERIES[f"q{i}"]] for i in range(6)}
        assert record["neg_q"] == [known.get(p) for p in record["neg_ids"]]
    assert any(q for record in records.values() for q in record["neg_q"])


def test_window_counts_without_positives(tiny_encoder, tmp_path):
    folder = make_collection(tmp_path)
    everything = run(tiny_encoder, folder, rank_to=15, negatives=15)
    window = run(tiny_encoder, folder, rank_from=3, rank_to=9, negatives=2, overwrite="true")
    for query_id, record in window.items():
        assert len(everything[query_id]["neg_ids"]) == 15
        assert record["neg_ids"] == everything[query_id]["neg_ids"][2:4]


def test_random_negatives_come_from_the_window_and_the_seed(tiny_encoder, tmp_path):
    folder = make_collection(tmp_path)
    ranked = run(tiny_encoder, folder, rank_to=15, negatives=15)
    options = {"rank_from": 2, "rank_to": 12, "negatives": 4, "sampling": "random", "overwrite": "true"}
    first, again, other = (run(tiny_encoder, folder, seed=seed, **options) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    drawn = set()
    for query_id, record in first.items():
        ranks = [ranked[query_id]["neg_ids"].index(passage) + 1 for passage in record["neg_ids"]]
        assert ranks == sorted(set(ranks))
        assert all(2 <= rank <= 12 for rank in ranks)
        drawn.update(ranks)
    assert max(drawn) > 5


def test_equal_texts_are_one_passage_and_never_a_negative_of_their_own(tiny_encoder, tmp_path):
    passages = {**PASSAGES, "twin0": "apple  brick 0", "twin9": PASSAGES["p9"], "blank": " "}
    records = run(
        tiny_encoder,
        make_collection(tmp_path, passages=passages),
        rank_to=40,
        negatives=40,
        max_positive_queries=9,
    )
    assert set(records["q0"]["neg_ids"]) == set(PASSAGES) - {"p0"}
    assert set(records["q1"]["neg_ids"]) == set(PASSAGES) - {"p1"}


def test_passages_of_another_split_are_no_negatives(tiny_encoder, tmp_path, capsys):
    splits = {"p9": "dev", "p10": "dev", "p11": "train"}
    records = run(tiny_encoder, make_collection(tmp_path, splits=splits), rank_to=40, negatives=40)
    for query_id, record in records.items():
        assert set(record["neg_ids"]) == set(PASSAGES) - {"p9", "p10", f"p{query_id[1:]}"}
    assert re.search(r"reserved to another split +2\n", capsys.readouterr().out)


def test_known_queries(tiny_encoder, tmp_path, capsys):
    positive_queries = {
        "p0": ["extra one", "extra two", QUERIES["q0"] + " "],
        "p9": ["about nine", " what  about brick"],
        "p10": [f"ten {i}" for i in range(7)],
        "gone": ["nobody"],
    }
    folder = make_collection(tmp_path, positive_queries=positive_queries)
    records = run(tiny_encoder, folder, rank_to=15, negatives=15, max_positive_queries=3)
    known = dict(zip(records["q1"]["neg_ids"], records["q1"]["neg_q"]))
    # p9 is known to answer the text of q1: no negative of it, though not judged.
    assert "p9" not in known
    assert known["p0"] == [QUERIES["q0"], "extra one", "extra two"]
    assert known["p11"] is None
    seen = [q for r in records.values() for p, queries in zip(r["neg_ids"], r["neg_q"]) if p == "p10" for q in queries]
    assert len(seen) == 3 * len(records)
    assert len(set(seen)) > 3  # drawn, not always the first ones
    assert "p9" in records["q0"]["neg_ids"]
    for record in records.values():
        assert all(record["query"] not in (queries or ()) for queries in record["neg_q"])
    output = capsys.readouterr().out
    assert re.search(r"positive_queries.jsonl left out: passage not in the corpus +1\n", output)
    assert re.search(r"known to answer the query, besides its positives +1\n", output)
    none = run(tiny_encoder, folder, max_positive_queries=0, overwrite="true")
    assert {q for record in none.values() for q in record["neg_q"]} == {None}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_dropped_queries_are_counted(tiny_encoder, tmp_path, capsys):
    passages = {key: PASSAGES[key] for key in ("p0", "p1", "p2")}
    qrels = {
        "q0": {"p0": 1},
        "q1": {"p1": 1, "gone": 1},
        "q2": {"gone": 1},
        "q3": {"p2": 0},
        "q4": dict.fromkeys(passages, 1),
    }
    records = run(tiny_encoder, make_collection(tmp_path, passages=passages, qrels=qrels))
    assert list(records) == ["q0", "q1"]
    assert records["q1"]["pos_ids"] == ["p1"]
    assert len(records["q0"]["neg"]) == 2
    output = capsys.readouterr().out
    assert re.search(r"no relevant passage in the corpus +3\n", output)
    assert re.search(r"no passage was left +1\n", output)
    assert re.search(r"fewer negatives than asked for +2\n", output)


def test_negatives_nearly_as_similar_as_the_positive_are_left_out(tiny_encoder, tmp_path, capsys):
    folder = make_collection(tmp_path)
    everything = run(tiny_encoder, folder, rank_to=15, negatives=15)
    limited = run(tiny_encoder, folder, rank_to=15, negatives=15, max_positive_ratio=0.95, overwrite="true")
    left_out = 0
    for query_id, record in everything.items():
        (positive,) = record["pos_scores"]
        scores = dict(zip(record["neg_ids"], record["neg_scores"]))
        expected = [p for p, score in scores.items() if score <= positive - 0.05 * abs(positive)]
        left_out += len(scores) - len(expected)
        assert (limited[query_id]["neg_ids"] if query_id in limited else []) == expected
    assert 0 < left_out < 15 * len(everything)
    output = capsys.readouterr().out
    assert re.search(rf"nearly as similar as a positive +{left_out}\n", output)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_which_of_several_positives_sets_the_limits(tiny_encoder, tmp_path, capsys):
    """With counts of what each number of positives costs."""
    qrels = {"q2": {f"p{i}": 1 for i in range(2, 9)}, "q0": {"p0": 1}, "q1": {"p1": 1, "p5": 1}}
    folder = make_collection(tmp_path, qrels=qrels)
    everything = run(tiny_encoder, folder, rank_to=15, negatives=15)
    rules = {"lowest": min, "mean": lambda scores: sum(scores) / len(scores), "highest": max}
    found = {}
    for rule, joined in rules.items():
        capsys.readouterr()
        options = {"rank_to": 15, "negatives": 15, "max_positive_ratio": 1, "overwrite": "true"}
        found[rule] = run(tiny_encoder, folder, positive_score=rule, **options)
        output = capsys.readouterr().out
        kinds = re.findall(r"queries of (\d positives?(?: or more)?) +\d+\n", output)
        assert kinds == ["1 positive", "2 positives", "3 positives or more"]
        for (query_id, record), kind in zip(everything.items(), ("1 positive", "2 positives", "3 positives or more")):
            positive = joined(record["pos_scores"])
            scores = dict(zip(record["neg_ids"], record["neg_scores"]))
            expected = [p for p, score in scores.items() if score <= positive]
            assert (found[rule][query_id]["neg_ids"] if query_id in found[rule] else []) == expected
            left_out = len(scores) - len(expected)
            assert re.search(rf"queries of {kind} +1\n", output)
            assert re.search(rf"queries of {kind}: negatives +{len(expected)}\n", output)
            assert re.search(rf"queries of {kind}: passages left out, nearly as similar +{left_out}\n", output)
            assert re.search(rf"queries of {kind}: no passage was left +{int(not expected)}\n", output)
    assert found["lowest"] != found["highest"]


def test_any_passage_of_the_corpus_without_an_encoder(tmp_path):
    records = run(tmp_path / "no model", make_collection(tmp_path), sampling="corpus", negatives=5)
    assert list(records) == list(QUERIES)
    for query_id, record in records.items():
        assert not list(find_faults(record))
        assert len(set(record["neg_ids"]) - {f"p{query_id[1:]}"}) == 5
        assert not {"pos_scores", "neg_scores"} & set(record)
    assert len({p for r in records.values() for p in r["neg_ids"]}) > 10


def test_prompts_are_used_but_not_written(tiny_encoder, tmp_path):
    folder = make_collection(tmp_path)
    plain = run(tiny_encoder, folder)
    prompted = run(tiny_encoder, folder, query_prompt="zzzz zzzz: ", overwrite="true")
    assert plain != prompted
    assert [r["query"] for r in prompted.values()] == list(QUERIES.values())
    assert {r["pos"][0] for r in prompted.values()} <= set(PASSAGES.values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank_from": 0}, "--rank_from: found 0, expected at least 1"),
        ({"rank_from": 9}, "expected 1 <= rank_from <= rank_to"),
        ({"negatives": 9}, "the window from rank 1 to 8 holds 8"),
        ({"negatives": 0}, "--negatives: found 0"),
        ({"max_positive_queries": -1}, "--max_positive_queries"),
        ({"sampling": "best"}, "sampling"),
        ({"passage_max_len": 300}, "--passage_max_len: found 300 tokens, the encoder takes 128 at most"),
        ({"language": "fa"}, "holds ko"),
        ({"split": "dev"}, "the splits here are train"),
        ({"negative": 3}, "did you mean 'negatives'?"),
        ({"max_overlap": 2}, "--max_overlap: found 2"),
        ({"reranker_batch_size": 0}, "--reranker_batch_size: found 0"),
        ({"reranker": "x", "sampling": "corpus"}, "--reranker: sampling 'corpus' ranks nothing"),
        ({"guide_margin": 0.1}, "--guide_margin: goes with guide, which is not set"),
        ({"guide_query_prompt": "q: "}, "--guide_query_prompt: goes with guide, which is not set"),
        ({"reranker_max_len": 64}, "--reranker_max_len: goes with reranker, which is not set"),
        ({"sampling_temperature": 1}, "--sampling_temperature: goes with sampling score, not with top"),
        ({"margin": 0.1, "sampling": "corpus"}, "--margin: goes with a sampling that ranks passages, not with corpus"),
        ({"quantize": "binary", "sampling": "corpus"}, "--quantize: goes with a search, and here is none"),
        ({"reranker": "/nowhere/reranker"}, "--reranker: /nowhere/reranker: neither a folder here nor a model"),
    ],
)
def test_mistakes_end_in_a_message(tiny_encoder, tmp_path, capsys, options, words):
    folder = make_collection(tmp_path)
    with pytest.raises(SystemExit) as exit:
        run(tiny_encoder, folder, **options)
    assert exit.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not (folder / "train.jsonl").exists()


def test_existing_output_is_not_overwritten_unasked(tiny_encoder, tmp_path, capsys):
    folder = make_collection(tmp_path)
    (folder / "train.jsonl").write_text(json.dumps({"query_id": "mine"}))
    with pytest.raises(SystemExit) as exit:
        run(tiny_encoder, folder)
    assert exit.value.code == 2
    assert "set overwrite" in capsys.readouterr().err
    assert json.loads((folder / "train.jsonl").read_text()) == {"query_id": "mine"}


def test_a_killed_overwrite_allows_nothing_to_the_next_run(tiny_encoder, tmp_path, monkeypatch, capsys):
    folder = make_collection(tmp_path)
    (folder / "train.jsonl").write_text("mine")

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("clpl_moe.mine.write_jsonl", killed)
        with pytest.raises(SystemExit):
            run(tiny_encoder, folder, overwrite="true")
    with pytest.raises(SystemExit):
        run(tiny_encoder, folder)
    assert "set overwrite" in capsys.readouterr().err
    assert (folder / "train.jsonl").read_text() == "mine"
    assert sorted(path.name for path in folder.iterdir()) == ["ko", "train.jsonl"]


@pytest.mark.parametrize("name", ["corpus.jsonl", "train_queries.jsonl", "positive_queries.jsonl"])
def test_the_collection_is_not_replaced_even_if_asked(tiny_encoder, tmp_path, capsys, name):
    folder = make_collection(tmp_path, positive_queries={"p1": ["x"]})
    before = {path.name: path.read_text() for path in (folder / "ko").iterdir()}
    argv = ["--model", str(tiny_encoder), "--collection", str(folder), "--language=ko", "--overwrite=true"]
    with pytest.raises(SystemExit) as exit:
        mine_command([*argv, "--output", str(folder / "ko" / ".." / "ko" / name)])
    assert exit.value.code == 2
    assert "this command reads the file" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in (folder / "ko").iterdir()} == before


def test_broken_positive_queries_name_the_line(tiny_encoder, tmp_path, capsys):
    folder = make_collection(tmp_path)
    (folder / "ko" / "positive_queries.jsonl").write_text('{"docid": "p1", "queries": ["x"]}\n{"docid": "p2"}\n')
    with pytest.raises(SystemExit) as exit:
        run(tiny_encoder, folder)
    assert exit.value.code == 2
    assert "positive_queries.jsonl:2: field 'queries': missing" in capsys.readouterr().err


KILLED = """
import os, signal, sys
from clpl_moe.retrieval import store

store.SHARD_TEXTS, written, left = 4, store.EmbeddingShards.write, int(sys.argv[1])

def write(self, number, embeddings):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    written(self, number, embeddings)
    print("wrote shard", number, flush=True)

store.EmbeddingShards.write = write
from clpl_moe.mine.__main__ import main
main(sys.argv[2:])
"""


@pytest.mark.slow
def test_killed_while_encoding_goes_on_where_it_was(tiny_encoder, tmp_path):
    folder = make_collection(tmp_path)

    def work(output, left):
        argv = ["--model", str(tiny_encoder), "--collection", str(folder), "--language", "ko", "--output", str(output)]
        argv += ["--rank_from=1", "--rank_to=8", "--negatives=4", "--max_positive_ratio=0", "--passage_max_len=100"]
        done = subprocess.run([sys.executable, "-c", KILLED, str(left), *argv], capture_output=True, text=True)
        assert done.returncode == (0 if left == 9 else -signal.SIGKILL), done.stderr
        return re.findall(r"wrote shard (\d)", done.stdout)

    shards = []
    for left in (1, 2, 9):
        assert not (tmp_path / "killed.jsonl").exists()
        shards += work(tmp_path / "killed.jsonl", left)
    assert sorted(shards) == ["0", "1", "2", "3"]  # none of them twice
    work(tmp_path / "whole.jsonl", 9)
    assert (tmp_path / "killed.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.jsonl", "ko", "whole.jsonl"]
