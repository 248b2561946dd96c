import gc
import json
import os
import pickle
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest

from clpl_moe.common.errors import UserError
from clpl_moe.retrieval.collection import Collection, normalize_text, read_positive_queries

OPEN_FILES = Path("/proc/self/fd")
CORPUS = [
    {"id": "p1", "title": "제목", "text": "본문"},
    {"id": "p2", "text": "no title"},
    {"id": "p3", "title": "", "text": " padded "},
]
QUERIES = [{"id": "q1", "text": "하나"}, {"id": "q2", "text": "둘"}]
QRELS = [
    {"qid": "q1", "docid": "p1", "relevance": 1},
    {"qid": "q1", "docid": "p2", "relevance": 0},
    {"qid": "q2", "docid": "p3", "relevance": 2},
]


def write(folder, corpus=CORPUS, queries=QUERIES, qrels=QRELS):
    folder.mkdir(parents=True, exist_ok=True)
    for name, records in (("corpus", corpus), ("dev_queries", queries), ("dev_qrels", qrels)):
        lines = (r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records)
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def test_load(tmp_path):
    write(tmp_path / "ko")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collection = Collection.load(tmp_path, "ko", "dev")
    assert list(collection.passage_ids) == ["p1", "p2", "p3"]
    assert list(collection.passages) == ["제목 본문", "no title", "padded"]
    assert collection.query_ids == ["q1", "q2"]
    assert collection.queries == ["하나", "둘"]
    assert collection.qrels == {"q1": {"p1": 1, "p2": 0}, "q2": {"p3": 2}}
    assert (collection.language, collection.split) == ("ko", "dev")


@pytest.mark.parametrize(
    ("where", "records", "place", "words"),
    [
        ("corpus", ["{"], "corpus.jsonl:1", "not JSON"),
        ("corpus", [*CORPUS, "[1]"], "corpus.jsonl:4", "expected a JSON object"),
        ("corpus", [], "corpus.jsonl", "empty"),
        ("corpus", ['{"id": "a", "text": "\\ud83d"}'], "corpus.jsonl:1", "half of a surrogate pair"),
        ("corpus", [{"text": "x"}], "corpus.jsonl:1: field 'id'", "missing"),
        (
            "corpus",
            [{"id": 1.5, "text": "x"}],
            "corpus.jsonl:1: field 'id'",
            "found float, expected a string or a whole number",
        ),
        ("corpus", [{"id": "a b", "text": "x"}], "corpus.jsonl:1: field 'id'", "white space"),
        ("corpus", [{"id": "", "text": "x"}], "corpus.jsonl:1: field 'id'", "white space"),
        ("corpus", [{"id": "a\0b", "text": "x"}], "corpus.jsonl:1: field 'id'", "found 'a\\x00b'"),
        ("corpus", [{"id": "p1", "text": None}], "corpus.jsonl:1: field 'text'", "found null"),
        (
            "corpus",
            [{"id": "p1", "text": "x", "title": 3}],
            "corpus.jsonl:1: field 'title'",
            "expected a string",
        ),
        ("corpus", [*CORPUS, CORPUS[0]], "corpus.jsonl:4: field 'id'", "'p1' stands on line 1"),
        ("queries", [QUERIES[0], QUERIES[0]], "dev_queries.jsonl:2: field 'id'", "line 1"),
        ("queries", [{"id": "q1", "text": " "}], "dev_queries.jsonl:1: field 'text'", "empty"),
        ("queries", [{"id": "q1", "query": "x"}], "dev_queries.jsonl:1: field 'text'", "missing"),
        ("qrels", [{"qid": "q9", "docid": "p1", "relevance": 1}], "dev_qrels.jsonl:1: field 'qid'", "'q9'"),
        (
            "qrels",
            [{"qid": "q1", "docid": "p1", "relevance": 10**12}],  # trec_eval gives an nDCG of 9e13
            "dev_qrels.jsonl:1: field 'relevance'",
            "at most 1000",
        ),
        ("qrels", [{"qid": "q1", "relevance": 1}], "dev_qrels.jsonl:1: field 'docid'", "missing"),
        ("qrels", [{"qid": "q1", "docid": "p1"}], "dev_qrels.jsonl:1: field 'relevance'", "found nothing"),
        (
            "qrels",
            [{"qid": "q1", "docid": "p1", "relevance": 0.5}],
            "dev_qrels.jsonl:1: field 'relevance'",
            "found 0.5, expected an integer",
        ),
        (
            "qrels",
            [{"qid": "q1", "docid": "p1", "relevance": True}],
            "dev_qrels.jsonl:1: field 'relevance'",
            "True",
        ),
        ("qrels", [QRELS[0], QRELS[0]], "dev_qrels.jsonl:2: field 'docid'", "judged twice"),
    ],
)
def test_faults(tmp_path, where, records, place, words):
    write(tmp_path / "ko", **{where: records})
    with pytest.raises(UserError) as error:
        Collection.load(tmp_path, "ko", "dev")
    assert str(error.value).startswith(f"{tmp_path / 'ko'}/{place}:")
    assert words in str(error.value)


@pytest.mark.parametrize("name", ["corpus", "dev_queries", "dev_qrels"])
def test_missing_file(tmp_path, name):
    write(tmp_path / "ko")
    (tmp_path / "ko" / f"{name}.jsonl").unlink()
    with pytest.raises(UserError, match=rf"{name}\.jsonl: no such file"):
        Collection.load(tmp_path, "ko", "dev")


def test_unknown_language_and_split_name_what_is_there(tmp_path):
    write(tmp_path / "ko")
    write(tmp_path / "fa")
    with pytest.raises(UserError, match="holds fa, ko"):
        Collection.load(tmp_path, "hi", "dev")
    with pytest.raises(UserError, match="the splits here are dev"):
        Collection.load(tmp_path, "ko", "test")
    with pytest.raises(UserError, match="nowhere: no such folder of collections"):
        Collection.load(tmp_path / "nowhere", "ko", "dev")
    with pytest.raises(UserError, match="corpus.jsonl: found a file, expected a folder of collections"):
        Collection.load(tmp_path / "ko/corpus.jsonl", "ko", "dev")
    with pytest.raises(UserError, match="ko/ko: no such folder; .*ko is a collection itself, name the folder above it"):
        Collection.load(tmp_path / "ko", "ko", "dev")
    with pytest.raises(UserError, match="found 'False', which is what YAML makes of words such as no"):
        Collection.load(tmp_path, "False", "dev")


def test_relevant_passage_missing_from_the_corpus_is_kept_and_warned_of(tmp_path):
    write(tmp_path / "ko", qrels=[*QRELS, {"qid": "q2", "docid": "gone", "relevance": 1}])
    with pytest.warns(UserWarning, match="1 relevant passages are not in the corpus, such as 'gone'"):
        collection = Collection.load(tmp_path, "ko", "dev")
    assert collection.qrels["q2"] == {"p3": 2, "gone": 1}


def test_queries_without_judgements_are_warned_of(tmp_path):
    write(tmp_path / "ko", qrels=[{"qid": "q1", "docid": "p1", "relevance": 0}])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Collection.load(tmp_path, "ko", "dev")
    messages = " ".join(str(w.message) for w in caught)
    assert "1 queries have no line here" in messages
    assert "1 queries have no relevant passage" in messages


def test_fingerprint_follows_content_only(tmp_path):
    write(tmp_path / "a" / "ko")
    write(tmp_path / "b" / "ko", qrels=QRELS[::-1])
    first = Collection.load(tmp_path / "a", "ko", "dev").fingerprint()
    assert Collection.load(tmp_path / "b", "ko", "dev").fingerprint() == first
    others = set()
    changes = [
        {"corpus": [*CORPUS[:2], {"id": "p3", "text": "other"}]},
        {"corpus": [CORPUS[0], {**CORPUS[1], "text": "p3"}, CORPUS[2]]},
        {"queries": [QUERIES[0], {"id": "q2", "text": "셋"}]},
        {"qrels": [*QRELS[:2], {**QRELS[2], "relevance": 1}]},
    ]
    for change in changes:
        write(tmp_path / "c" / "ko", **change)
        others.add(Collection.load(tmp_path / "c", "ko", "dev").fingerprint())
    assert len(others) == len(changes)
    assert first not in others


def test_passages_are_a_sequence(tmp_path):
    write(tmp_path / "ko")
    collection = Collection.load(tmp_path, "ko", "dev")
    for texts, expected in (
        (collection.passage_ids, ["p1", "p2", "p3"]),
        (collection.passages, ["제목 본문", "no title", "padded"]),
    ):
        assert len(texts) == 3
        assert [texts[i] for i in (0, 2, -1, -3)] == [expected[i] for i in (0, 2, -1, -3)]
        assert texts[np.int64(1)] == expected[1]
        assert (texts[1:], texts[::-1], texts[5:]) == (expected[1:], expected[::-1], [])
        assert list(reversed(texts)) == expected[::-1]
        for missing in (3, -4):
            with pytest.raises(IndexError):
                texts[missing]


def test_blank_lines_a_byte_order_mark_and_no_last_line_end(tmp_path):
    write(tmp_path / "ko")
    lines = [json.dumps(record, ensure_ascii=False) for record in CORPUS]
    text = "\n \n\x0c\n".join(lines)
    (tmp_path / "ko" / "corpus.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    collection = Collection.load(tmp_path, "ko", "dev")
    assert list(collection.passages) == ["제목 본문", "no title", "padded"]
    (tmp_path / "ko" / "corpus.jsonl").write_text(f"{text}\n\n{lines[1]}", encoding="utf-8")
    with pytest.raises(UserError, match="jsonl:9: field 'id': 'p2' stands on line 4 already"):
        Collection.load(tmp_path, "ko", "dev")


def test_texts_are_not_held_in_memory(tmp_path):
    corpus = [{"id": f"passage-{i}", "title": "t", "text": f"{i} " * 500} for i in range(1000)]
    write(tmp_path / "ko", corpus=corpus, qrels=[{"qid": "q1", "docid": "passage-0", "relevance": 1}])
    size = (tmp_path / "ko" / "corpus.jsonl").stat().st_size
    tracemalloc.start()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        collection = Collection.load(tmp_path, "ko", "dev")
    for work in (lambda: None, lambda: sum(map(len, collection.passages)), collection.fingerprint):
        work()
        assert tracemalloc.get_traced_memory()[1] < size / 5
    tracemalloc.stop()
    assert collection.passages[999] == f"t {'999 ' * 500}".strip()


def test_a_file_that_takes_the_corpus_place_changes_nothing_and_one_that_is_changed_is_told_of(tmp_path):
    write(tmp_path / "ko")
    path = tmp_path / "ko" / "corpus.jsonl"
    collection = Collection.load(tmp_path, "ko", "dev")
    (tmp_path / "other").write_text("something else\n")
    (tmp_path / "other").replace(path)
    assert collection.passages[0] == "제목 본문"
    write(tmp_path / "ko")
    collection = Collection.load(tmp_path, "ko", "dev")
    path.write_text("something else\n")
    with pytest.raises(UserError, match="corpus.jsonl: changed while it was in use"):
        list(collection.passages)


def test_another_process_opens_the_file_itself(tmp_path):
    """Workers that are no forks get the collection as bytes, and none of this process's open files."""
    write(tmp_path / "ko")
    collection = Collection.load(tmp_path, "ko", "dev")
    texts, sent = list(collection.passages), pickle.dumps(collection)
    del collection
    gc.collect()
    assert list(pickle.loads(sent).passages) == texts


@pytest.mark.skipif(not OPEN_FILES.is_dir(), reason="counts open files where Linux lists them")
def test_the_file_is_closed_when_the_collection_is_gone(tmp_path):
    def times_open():
        """Not how many files are: other threads of the test run open some, too."""
        return [os.path.realpath(file) for file in OPEN_FILES.iterdir()].count(os.path.realpath(corpus))

    write(tmp_path / "ko")
    corpus = tmp_path / "ko" / "corpus.jsonl"
    collections = [Collection.load(tmp_path, "ko", "dev") for _ in range(3)]
    assert times_open() == len(collections)
    del collections
    gc.collect()
    assert times_open() == 0


def test_normalize_text():
    assert normalize_text(" 가\t나\n 다 ") == "가 나 다"
    assert normalize_text("각") == "각"


def test_positive_queries(tmp_path):
    path = tmp_path / "positive_queries.jsonl"
    path.write_text('{"docid": "p1", "queries": ["a", "b"]}\n{"docid": "p2", "queries": []}\n')
    assert list(read_positive_queries(path)) == [("p1", ["a", "b"]), ("p2", [])]
    for line, words in (
        ('{"docid": "p1", "queries": "a"}', "found str, expected a list"),
        ('{"docid": "p1", "queries": [""]}', "found ''"),
        ('{"queries": []}', "field 'docid': missing"),
    ):
        path.write_text(line)
        with pytest.raises(UserError, match=words):
            list(read_positive_queries(path))


def test_ids_and_grades_as_other_tools_write_them(tmp_path):
    """Numbers as ids, a space that does not break within one, grades with a decimal point."""
    write(
        tmp_path / "ko",
        corpus=[{"id": 7, "text": "x"}, {"id": "a\u00a0b", "text": "y"}],
        queries=[{"id": 1, "text": "q"}],
        qrels=[{"qid": 1, "docid": 7, "relevance": 1.0}, {"qid": "1", "docid": "a\u00a0b", "relevance": 0}],
    )
    collection = Collection.load(tmp_path, "ko", "dev")
    assert list(collection.passage_ids) == ["7", "a\u00a0b"]
    assert collection.qrels == {"1": {"7": 1, "a\u00a0b": 0}}
    assert type(collection.qrels["1"]["7"]) is int
