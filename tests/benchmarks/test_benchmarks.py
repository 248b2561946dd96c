import json
import mmap
import sys
from pathlib import Path

import pytest
import torch

from clpl_moe.mine.rank import Ranking
from helpers.mining import make_collection

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import common
import corpus
import false_negatives
import false_negatives_rules as rules
import scaling
import table
import training


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


def embed_letters(kind, texts):
    """Cosines by the letters that two texts share, whatever their bytes."""
    rows = torch.zeros(len(texts), 64)
    for row, text in zip(rows, texts):
        for letter in rules.text_key(text):
            row[ord(letter) % 64] += 1
    return torch.nn.functional.normalize(rows)


def test_copies_in_other_bytes_are_false_negatives_until_a_key_knows_them(tmp_path):
    contexts = [
        f"کتاب شماره {word} در سال ۱۳{number} نوشته شد." for number, word in enumerate(["یک", "دو", "سه", "چهار"], 10)
    ]
    questions = [f"کتاب {word} کی نوشته شد؟" for word in ("یک", "دو", "سه", "چهار")]
    answers = [
        [{"text": f"سال ۱۳{number}", "answer_start": 0}] for number in (10, 11, 12, 10)
    ]  # the first answers the last
    qas = [{"id": f"q{i}", "question": q, "answers": a} for i, (q, a) in enumerate(zip(questions, answers))]
    paragraphs = [{"context": context, "qas": [qa]} for context, qa in zip(contexts, qas)]
    squad = tmp_path / "squad.json"
    squad.write_text(json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}), encoding="utf-8")
    collection = rules.with_copies(squad, "fa", tmp_path, passages=9, questions=9)
    assert len(collection.passage_ids) == 8
    no_limits = {"rank_from": 1, "rank_to": 8, "max_positive_ratio": 0, "negatives": 8}
    found = rules.measure_copies_and_guides(collection, squad, embed_letters, **no_limits)
    before, now = (found[f"at most 95%, {name}"] for name in ("before", "with the key"))
    assert before["negatives"] == 4 * 7
    assert before["copies"] == pytest.approx(4 / 28, abs=1e-4)
    assert now["negatives"] == 4 * 3
    assert now["copies"] == 0
    assert now["hold the answer"] == pytest.approx(1 / 12, abs=1e-4)
    assert found["at most 95%, with the key, a guide that knows the answers"]["hold the answer"] == 0
    assert [row["copies, fa"] for row in rules.rows_of_copies({"fa": found})][:2] == ["14.3%", "0.0%"]


@pytest.mark.parametrize("text", ["한국어 문장. 둘째", "کتاب یکی می\u200cشود ۱۲", "क़लम १२। दूसरा"])
def test_other_bytes_are_the_same_text_to_the_key_only(text):
    copy = rules.other_bytes(text)
    assert copy != text
    assert rules.text_key(copy) == rules.text_key(text)


def test_hidden_positives_that_a_rule_lets_through_are_counted(tmp_path):
    passages = {"a": "abcd", "b": "abce", "c": "abfg", "d": "hijk", "e": "lmno"}
    qrels = {"q0": {"a": 1, "b": 1, "c": 1}, "q1": {"a": 1, "d": 1}}
    folder = make_collection(tmp_path, passages, {"q0": "abcd", "q1": "abck"}, qrels)
    collection = rules.Collection.load(folder, "ko", "train")
    both = {"no limit": {"max_positive_ratio": 0, "rank_from": 1, "max_overlap": 1, "negatives": 2, "rank_to": 2}}
    found = rules.measure_several_positives(
        collection, embed_letters, both | {"strict": both["no limit"] | {"margin": 0.1}}
    )
    assert (found["no limit"]["hidden positives"], found["no limit"]["mined"]) == (3, 3)
    assert found["strict"]["mined"] < 3
    assert (found["no limit"]["queries"], found["no limit"]["negatives"]) == (2, 4)
    centred = rules.centred(embed_letters)("passage", list(passages.values()))
    assert centred.norm(dim=1).tolist() == pytest.approx([1] * 5)


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
    (tmp_path / "hog.py").write_text(
        "import sys, time\nx = bytearray(150 * 2**20)\nopen(sys.argv[1], 'w')\ntime.sleep(600)"
    )
    held = torch.ones(100, 2**20)  # 400 MiB of this process
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    ready = []

    def stop():
        ready.append((tmp_path / "ready").exists())
        return ready[-2:] == [True, True]  # its peak has been read in between

    result = corpus.run_command(["hog", str(tmp_path / "ready")], stop)
    assert result["killed"]
    assert 150 * 2**20 < result["peak_bytes"] < 300 * 2**20
    assert held.sum() > 0
    with pytest.raises(RuntimeError, match="ended with code 1"):
        corpus.run_command(["no_such_module"])


def test_ours_trains_what_the_contenders_name_says(tiny_encoder, tmp_path):
    lines = [{"query": f"query {i}", "pos": [f"passage {i}"], "neg": [f"other {i}"]} for i in range(4)]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    job = {"model": str(tiny_encoder), "data": str(data), "device": "cpu", "precision": "fp32", "steps": 1, "batch": 2}
    job |= {"group": 2, "query_max_len": 16, "passage_max_len": 16}
    job["contender"] = training.CONTENDERS["clpl_moe, contrastive, dense, all trained"]
    trainer = training.train_ours(job, str(tmp_path), training.step_timer("cpu"))
    frozen = [name for name, parameter in trainer.model.named_parameters() if not parameter.requires_grad]
    assert [name for name in frozen if "pooler" not in name] == []
