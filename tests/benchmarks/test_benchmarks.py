import json
import mmap
import sys
import time
from pathlib import Path

import pytest
import torch

from clpl_moe.mine.rank import Ranking

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import common
import corpus
import false_negatives
import scaling
import table


def test_contenders_take_turns_and_every_other_round_backwards():
    calls = []
    functions = {name: (lambda name=name: calls.append(name) or len(calls)) for name in "abc"}
    results = common.alternate(functions, 3)
    assert "".join(calls) == "abccbaabc"
    assert results == {"a": [1, 6, 7], "b": [2, 5, 8], "c": [3, 4, 9]}


def test_summaries():
    assert common.summary([4.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 4.0, "spread": 1.5}
    assert common.slope([1, 2, 8], [3.0, 12.0, 192.0]) == pytest.approx(2)


def test_peak_memory_sees_what_was_freed_and_forgets_on_reset():
    common.reset_peak_memory("cpu")
    before = common.peak_memory("cpu")
    with mmap.mmap(-1, 240 * 2**20) as memory:  # not through malloc, which may have kept as much
        memory[::4096] = bytes(len(memory) // 4096)
    assert common.peak_memory("cpu") - before > 200 * 2**20
    if Path("/proc/self/clear_refs").exists():
        common.reset_peak_memory("cpu")
        assert common.peak_memory("cpu") - before < 100 * 2**20


def test_a_result_becomes_a_table_without_names_of_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/benchmarks/training.py", "--model", "/home/me/small"])
    rows = [{"trainer": "a", "examples/s": 2.5}, {"trainer": "b", "examples/s": 1}]
    common.write_result(tmp_path / "x.json", "Which?", {"precision": "fp32", "model": "small"}, rows, {})
    text = (tmp_path / "x.json").read_text()
    assert "/home" not in text
    assert "/somewhere" not in text
    lines = table.table(json.loads(text), "x.json").splitlines()
    assert lines[:6] == ["Which?", "", "| trainer | examples/s |", "|---|--:|", "| a | 2.5 |", "| b | 1 |"]
    assert "`python benchmarks/training.py --model small`" in lines[-1]


def test_a_measured_step_trains_the_experts(tiny_encoder, monkeypatch):
    """The time of a step that computes nothing would be of no use."""
    trained = []
    optimizer = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, **k: trained.extend(parameters) or optimizer(trained))
    step = scaling.make_step(str(tiny_encoder), experts=3, batch=2, length=8, device="cpu", precision="fp32")
    before = [p.detach().clone() for p in trained]
    assert step() > 0
    assert sum(not p.equal(b) for p, b in zip(trained, before)) >= len(trained) - 1
    assert {p.shape[0] for p in trained} == {3}


def test_curves_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    curve = {"values": [1, 2, 4], "seconds": [common.summary([t, 2 * t]) for t in (1.0, 2.0, 4.0)], "exponent": 1.0}
    scaling.draw(tmp_path / "curves.png", dict.fromkeys(scaling.CURVES, curve))
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_false_negatives_are_those_that_hold_the_answer(tmp_path, monkeypatch):
    contexts = [
        "The tower is of 1889.",
        "A bridge; it has stood since 1889!",
        "No year stands here.",
        "Nor here, 1932.",
    ]
    questions = [
        {"id": f"q{i}", "question": f"Which year, {i}?", "answers": [{"text": text, "answer_start": 0}]}
        for i, text in enumerate(["1889.", "SINCE  1889", "year", "1932"])
    ]
    paragraphs = [{"context": c, "qas": [q]} for c, q in zip(contexts, questions)]
    squad = tmp_path / "squad.json"
    squad.write_text(json.dumps({"data": [{"title": str(i), "paragraphs": [p]} for i, p in enumerate(paragraphs)]}))
    squad_of = {c: i for i, c in enumerate(contexts)}

    def rank(queries, index, *_, **__):
        """The higher the number of a passage, the more similar; positives at 0.9."""
        order = sorted(range(len(index)), key=lambda place: -squad_of[index.texts[place]])
        scores = [0.1 * (squad_of[index.texts[place]] + 5) for place in order]
        shape = (len(queries), 1)
        places = torch.tensor([order]).repeat(shape)
        return Ranking(torch.tensor([scores]).repeat(shape), places, [[0.65] for _ in queries])

    monkeypatch.setattr(false_negatives, "rank_passages", rank)
    stock = false_negatives.prepare
    monkeypatch.setattr(false_negatives, "prepare", lambda argv: stock([*argv, "--dev_share", "0"]))
    result = false_negatives.measure(squad, "ko", tmp_path / "work", None, None, negatives=3)
    assert (result["queries"], result["positives_with_answer"]) == (4, 1.0)
    # Of 12 negatives: the bridge holds 1889, the third one's answer stands in no other.
    found = result["settings"]["top, no limit"]
    assert (found["negatives"], found["false"], found["queries_without_negatives"]) == (12, 1, 0.0)
    # At most 0.65: passages 0 (0.5) and 1 (0.6).
    found = result["settings"]["top, at most 100%"]
    assert (found["negatives"], found["false"]) == (6, 1)
    assert found["queries_with_fewer"] == 1.0


def test_synthetic_corpora_begin_alike_and_the_model_knows_their_words(tmp_path):
    from transformers import AutoTokenizer

    from clpl_moe.retrieval.collection import Collection

    small, large = (
        Collection.load(corpus.make_collection(tmp_path / str(n), n, 5, words=50), corpus.LANGUAGE, "dev")
        for n in (20, 40)
    )
    assert list(small.passages) == large.passages[:20]
    assert (len(large.passages), len(large.queries)) == (40, 5)
    tokenizer = AutoTokenizer.from_pretrained(corpus.make_model(tmp_path / "model", layers=1, width=32, words=50))
    ids = tokenizer([*large.passages, *large.queries])["input_ids"]
    assert tokenizer.unk_token_id not in {token for text in ids for token in text}
    for query_id, judged in large.qrels.items():
        (passage,) = judged
        query = large.queries[large.query_ids.index(query_id)].split()
        assert set(query) <= set(large.passages[large.passage_ids.index(passage)].split())


def test_the_peak_of_a_command_is_its_own_and_a_kill_is_told(tmp_path, monkeypatch):
    (tmp_path / "hog.py").write_text("x = bytearray(150 * 2**20)\nprint('done')\nimport time; time.sleep(60)")
    held = torch.ones(100, 2**20)  # 400 MiB of this process
    begun = time.perf_counter()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = corpus.run_command(["hog"], stop=lambda: time.perf_counter() - begun > 4)
    assert result["killed"]
    assert 150 * 2**20 < result["peak_bytes"] < 300 * 2**20
    assert held.sum() > 0
    with pytest.raises(RuntimeError, match="ended with code 1"):
        corpus.run_command(["no_such_module"])
