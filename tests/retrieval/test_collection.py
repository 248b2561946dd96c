import json
import warnings

import pytest

from clpl_moe.errors import UserError
from clpl_moe.retrieval.collection import Collection, normalize_text, read_positive_queries

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
        ("corpus", [{"id": 1, "text": "x"}], "corpus.jsonl:1: field 'id'", "found int, expected a string"),
        ("corpus", [{"id": "a b", "text": "x"}], "corpus.jsonl:1: field 'id'", "white space"),
        ("corpus", [{"id": "", "text": "x"}], "corpus.jsonl:1: field 'id'", "white space"),
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
            [{"qid": "q1", "docid": "p1", "relevance": 1.0}],
            "dev_qrels.jsonl:1: field 'relevance'",
            "1.0",
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
    with pytest.raises(UserError, match="no such folder"):
        Collection.load(tmp_path / "nowhere", "ko", "dev")


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
