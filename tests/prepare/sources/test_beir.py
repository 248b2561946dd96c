import gzip
import json

import pytest

from clpl_moe.common.files import read_jsonl
from clpl_moe.prepare.__main__ import main
from clpl_moe.retrieval.collection import Collection


def jsonl(path, *records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def beir(folder):
    (folder / "qrels").mkdir(parents=True)
    jsonl(
        folder / "corpus.jsonl",
        {"_id": "d1", "title": "One", "text": "first", "metadata": {"url": "x"}},
        {"_id": "d2", "title": "", "text": "second"},
        {"_id": "d3", "text": "third"},
    )
    jsonl(folder / "queries.jsonl", *({"_id": f"q{n}", "text": f"question {n}", "metadata": {}} for n in range(4)))
    (folder / "qrels/train.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td1\t1\nq1\td2\t2\nq1\td3\t0\n")
    (folder / "qrels/test.tsv").write_text("q2\td3\t1\n")  # without the line of names
    return folder


def prepare(folder, output, *words):
    main(["--beir", str(folder), "--language", "en", "--output", str(output), *words])


def test_every_split_takes_the_queries_that_it_judges(tmp_path, capsys):
    prepare(beir(tmp_path / "set"), tmp_path / "out")
    train, test = (Collection.load(tmp_path / "out", "en", split) for split in ("train", "test"))
    assert [record for _, record in read_jsonl(tmp_path / "out/en/corpus.jsonl")] == [
        {"id": "d1", "title": "One", "text": "first"},
        {"id": "d2", "title": "", "text": "second"},
        {"id": "d3", "title": "", "text": "third"},
    ]
    assert dict(zip(train.query_ids, train.queries)) == {"q0": "question 0", "q1": "question 1"}
    assert train.qrels == {"q0": {"d1": 1}, "q1": {"d2": 2, "d3": 0}}
    assert (test.query_ids, test.qrels) == (["q2"], {"q2": {"d3": 1}})
    assert not (tmp_path / "out/en/positive_queries.jsonl").exists()
    printed = capsys.readouterr().out.split()
    assert " ".join(printed).startswith("passages 3 test queries 1 test judgements: relevant 1 train queries 2 ")


def test_named_splits_and_compressed_files(tmp_path):
    folder = beir(tmp_path / "set")
    for name in ("corpus.jsonl", "queries.jsonl"):
        (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
        (folder / name).unlink()
    prepare(folder, tmp_path / "out", "--splits", "test", "--titles", "false")
    assert {path.name for path in (tmp_path / "out/en").iterdir()} == {
        "corpus.jsonl",
        *("test_queries.jsonl", "test_qrels.jsonl"),
    }
    assert list(Collection.load(tmp_path / "out", "en", "test").passages) == ["first", "second", "third"]


def append(text):
    def change(path):
        with path.open("a", encoding="utf-8") as file:
            file.write(text)

    return change


FAULTS = {
    "no corpus": ("corpus.jsonl", lambda path: path.unlink(), "corpus.jsonl: no such file; BEIR's layout is"),
    "no queries": ("queries.jsonl", lambda path: path.unlink(), "queries.jsonl: no such file"),
    "repeated passage": ("corpus.jsonl", append('{"_id": "d2", "text": "x"}\n'), ":4: field '_id': 'd2' stands at "),
    "cut passage": ("corpus.jsonl", append('{"_id": "d4", "te'), "corpus.jsonl:4: not JSON"),
    "repeated query": (
        "queries.jsonl",
        append('{"_id": "q0", "text": "x"}\n'),
        ":5: field '_id': 'q0' stands on line 1",
    ),
    "empty query": ("queries.jsonl", append('{"_id": "q9", "text": " "}\n'), ":5: field 'text': the query is empty"),
    "number as id": (
        "queries.jsonl",
        append('{"_id": 9.5, "text": "x"}\n'),
        ":5: field '_id': found 9.5, expected a string or a whole number",
    ),
    "unknown query": ("qrels/train.tsv", append("q9\td1\t1\n"), "train.tsv:5: field 'query-id': 'q9' is not an id of "),
    "score": (
        "qrels/train.tsv",
        append("q0\td2\t0.5\n"),
        "train.tsv:5: field 'score': found '0.5', expected an integer",
    ),
    "too relevant": (
        "qrels/train.tsv",
        append("q0\td2\t5000\n"),
        "train.tsv:5: field 'score': found 5000, expected at most 1000",
    ),
    "fields": (
        "qrels/test.tsv",
        append("q2 0 d1 1 x\n"),
        "test.tsv:2: found 5 fields, expected 3: query-id, corpus-id",
    ),
    "score in the first line": (
        "qrels/test.tsv",
        lambda p: p.write_text("q2\td1\t0.5\nq2\td3\t1\n"),
        "test.tsv:1: field 'score': found '0.5', expected an integer",
    ),
    "names in the second line": (
        "qrels/test.tsv",
        append("query-id\tcorpus-id\tscore\n"),
        "test.tsv:2: field 'score': found 'score', expected an integer",
    ),
    "names only": ("qrels/test.tsv", lambda p: p.write_text("query-id\tcorpus-id\tscore\n"), "holds no judgement"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_name_the_place_and_write_nothing(tmp_path, capsys, name):
    file, change, words = FAULTS[name]
    folder = beir(tmp_path / "set")
    change(folder / file)
    with pytest.raises(SystemExit) as stop:
        prepare(folder, tmp_path / "out")
    assert stop.value.code == 2
    message = capsys.readouterr().err
    message = message[message.index("error: ") :]
    assert message.startswith(f"error: {folder / file}")
    assert words in message
    assert message.count("\n") == 1
    assert not list((tmp_path / "out").iterdir()) if (tmp_path / "out").exists() else True


def test_the_source_is_not_replaced_by_its_own_collection(tmp_path, capsys):
    folder = beir(tmp_path / "ds" / "en")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    link = tmp_path / "link"
    link.symlink_to(folder)
    for source in (folder, link):
        with pytest.raises(SystemExit) as stop:
            prepare(source, tmp_path / "ds", "--overwrite", "true")
        assert stop.value.code == 2
        assert "the collection would replace" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    prepare(folder, folder)  # beside its files, nothing of them is replaced
    assert (folder / "en" / "corpus.jsonl").is_file()


def test_missing_folders_and_splits(tmp_path, capsys):
    folder = beir(tmp_path / "set")
    for words, argv in (
        ("qrels/dev.tsv: no such file; the splits here are test, train", ("--splits", "dev")),
        ("--source: goes with miracl, not with beir", ("--source", "x")),
    ):
        with pytest.raises(SystemExit):
            prepare(folder, tmp_path / "out", *argv)
        assert words in capsys.readouterr().err
    for path in (folder / "qrels").iterdir():
        path.unlink()
    for words, where in (("expected one for each split", folder), ("no such folder", tmp_path / "none")):
        with pytest.raises(SystemExit):
            prepare(where, tmp_path / "out")
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "sources to prepare from: found none, set one of beir, hub, ir_dataset, miracl or squad"),
        (["--beir", "x"], "--language: missing"),
        (
            ["--squad", "x.json", "--language", "ko", "--splits", "dev"],
            "--splits: goes with beir and hub and miracl, not with squad",
        ),
    ],
)
def test_one_source_and_a_name(tmp_path, capsys, argv, words):
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--output", str(tmp_path)])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("test.tsv", "q2 0 d1 1.0\nq2\t0\td\u00a04\t0\n"),
        ("test.trec", "q2 Q0 d1 1\r\nq2 Q0 d\u00a04 0\r\n"),
        ("test.tsv", "\ufeffquery-id\tcorpus-id\tscore\nq2\td1\t1.0\nq2\td\u00a04\t0\n"),
        ("test.tsv", "\ufeff\n\nquery-id\tcorpus-id\tscore\nq2\td1\t1\nq2\td\u00a04\t0\n"),
        (
            "test.jsonl",
            '{"query-id": "q2", "corpus-id": "d1", "score": 1}\n{"qid": "q2", "docid": "d\u00a04", "relevance": 0.0}\n',
        ),
    ],
    ids=["four columns", "trec", "decimals", "blank lines first", "jsonl"],
)
def test_judgements_as_other_tools_write_them(tmp_path, name, content):
    folder = beir(tmp_path / "set")
    append('{"_id": "d\u00a04", "text": "fourth"}\n{"_id": 5, "text": "fifth"}\n')(folder / "corpus.jsonl")
    (folder / "qrels/test.tsv").unlink()
    (folder / "qrels" / name).write_text(content, encoding="utf-8")
    prepare(folder, tmp_path / "out", "--splits", "test")
    collection = Collection.load(tmp_path / "out", "en", "test")
    assert collection.qrels == {"q2": {"d1": 1, "d\u00a04": 0}}
    assert list(collection.passage_ids)[-2:] == ["d\u00a04", "5"]


def test_one_split_in_two_files_is_refused(tmp_path, capsys):
    folder = beir(tmp_path / "set")
    (folder / "qrels/test.jsonl").write_text("{}")
    with pytest.raises(SystemExit):
        prepare(folder, tmp_path / "out")
    assert "test.tsv: the same split as test.jsonl; keep one of the two" in capsys.readouterr().err
