"""A stand-in that is registered in the real library, from files as TREC and MIRACL have them."""

import json

import pytest

from clpl_moe.prepare.__main__ import main
from clpl_moe.retrieval.collection import Collection

ir_datasets = pytest.importorskip("ir_datasets")


class File:
    """What the library reads in place of a download."""

    def __init__(self, path):
        self.file = path

    def path(self, *_):
        return str(self.file)

    def stream(self):
        return self.file.open("rb")


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    from ir_datasets.datasets.base import Dataset
    from ir_datasets.datasets.miracl import MiraclDoc
    from ir_datasets.formats import JsonlDocs, TrecQrels, TsvQueries

    docs = [{"docid": f"d\u00a0{n}", "title": f"제목 {n}", "text": f"본문 {n}"} for n in range(3)]
    files = {
        "docs.jsonl": "".join(json.dumps(doc, ensure_ascii=False) + "\n" for doc in docs),
        "train.tsv": "q1\t질문 하나\nq2\t질문 둘\n",
        "train.trec": "q1 0 d1 1\nq2 0 d2 0\n",
        "dev.tsv": "q3\t질문 셋\n",
        "dev.trec": "q3 0 d0 2\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text.replace("d\u00a0", "d"), encoding="utf-8")
    fields = {"doc_id": "docid", "title": "title", "text": "text"}
    corpus = JsonlDocs(
        [File(tmp_path / "docs.jsonl")], doc_cls=MiraclDoc, mapping=fields, namespace="stand-in", lang="ko",
        docstore_path=tmp_path / "docs",
    )  # fmt: skip
    registered = {"stand-in": Dataset(corpus)}
    for split in ("train", "dev"):
        queries = TsvQueries(File(tmp_path / f"{split}.tsv"), lang="ko")
        registered[f"stand-in/{split}"] = Dataset(corpus, queries, TrecQrels(File(tmp_path / f"{split}.trec"), {}))
    monkeypatch.setattr(ir_datasets.registry, "_registered", {**ir_datasets.registry._registered, **registered})
    return tmp_path


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        main([*map(str, argv)])
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_splits_share_the_passages(stand_in, capsys):
    main(["--ir_dataset", "stand-in/train", "stand-in/dev", "--output", str(stand_in / "out")])
    train, dev = (Collection.load(stand_in / "out", "ko", split) for split in ("train", "dev"))
    assert list(train.passages) == [f"제목 {n} 본문 {n}" for n in range(3)]
    assert dict(zip(train.query_ids, train.queries)) == {"q1": "질문 하나", "q2": "질문 둘"}
    assert (train.qrels, dev.qrels) == ({"q1": {"d1": 1}, "q2": {"d2": 0}}, {"q3": {"d0": 2}})
    assert train.titled == 3
    main(["--ir_dataset", "stand-in/dev", "--titles", "false", "--output", str(stand_in / "out")])
    assert list(Collection.load(stand_in / "out", "ko-no-titles", "dev").passages) == [f"본문 {n}" for n in range(3)]


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (["nothing/at-all"], "nothing/at-all: not an id of ir_datasets"),
        (
            ["stand-in"],
            "stand-in: a data set without queries, expected one with judged queries; below it are stand-in/",
        ),
        (["stand-in/dev", "stand-in/dev"], "--ir_dataset: found two ids of a split 'dev'"),
    ],
)
def test_faults(stand_in, capsys, ids, words):
    assert words in refused(capsys, "--ir_dataset", *ids, "--output", stand_in / "out")
    assert not (stand_in / "out").exists() or not list((stand_in / "out").iterdir())


def test_a_judged_query_that_is_missing(stand_in, capsys):
    (stand_in / "dev.trec").write_text("q9 0 d0 2\n")
    message = refused(capsys, "--ir_dataset", "stand-in/dev", "--output", stand_in / "out")
    assert "stand-in/dev: judges a query 'q9' that it does not have" in message
    (stand_in / "dev.trec").unlink()
    message = refused(capsys, "--ir_dataset", "stand-in/dev", "--output", stand_in / "out")
    assert "dev.trec" in message
