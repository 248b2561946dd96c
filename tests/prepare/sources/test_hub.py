"""Folders laid out as repositories of the hub, which `datasets` loads in the same way."""

import json

import pandas
import pytest

from clpl_moe.prepare.__main__ import main
from clpl_moe.retrieval.collection import Collection

CORPUS = [{"_id": "d1", "title": "제목", "text": "본문"}, {"_id": "d2", "title": "", "text": "둘째"}]
QUERIES = [{"_id": f"q{n}", "text": f"질문 {n}"} for n in range(3)]
QRELS = {
    "train": [{"query-id": "q0", "corpus-id": "d1", "score": 1}],
    "dev": [{"query-id": "q1", "corpus-id": "d2", "score": 2.0}, {"query-id": "q1", "corpus-id": "d1", "score": 0.0}],
}


def repository(folder, corpus=CORPUS, queries=QUERIES, qrels=QRELS, prefix="", judgements="default"):
    folder.mkdir()
    configs = {f"{prefix}corpus": {"corpus": corpus}, f"{prefix}queries": {"queries": queries}, judgements: qrels}
    yaml = ["configs:"]
    for config, splits in configs.items():
        yaml += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            path = f"{config}-{split}.parquet"
            pandas.DataFrame(rows).to_parquet(folder / path)
            yaml += [f"  - split: {split}", f"    path: {path}"]
    (folder / "README.md").write_text("\n".join(["---", *yaml, "---", ""]))
    return folder


def prepare(folder, output, *words):
    main(["--hub", str(folder), "--output", str(output), *words])


@pytest.mark.parametrize(("prefix", "judgements"), [("", "default"), ("", "qrels"), ("ko-", "ko"), ("ko-", "ko-qrels")])
def test_layouts_of_mteb(tmp_path, prefix, judgements):
    folder = repository(tmp_path / "set", prefix=prefix, judgements=judgements)
    prepare(folder, tmp_path / "out", *(["--subset", "ko"] if prefix else ["--language", "ko"]))
    train, dev = (Collection.load(tmp_path / "out", "ko", split) for split in ("train", "dev"))
    assert (list(train.passage_ids), list(train.passages)) == (["d1", "d2"], ["제목 본문", "둘째"])
    assert dict(zip(dev.query_ids, dev.queries)) == {"q1": "질문 1"}
    assert (train.qrels, dev.qrels) == ({"q0": {"d1": 1}}, {"q1": {"d2": 2, "d1": 0}})


def test_named_splits_numbers_as_ids_and_passages_of_several_splits(tmp_path):
    folder = repository(
        tmp_path / "set",
        corpus=[{"id": 1, "text": "a"}, {"id": 2, "text": "b"}],
        queries=[{"id": 7, "text": "q"}],
        qrels={
            "test": [{"query_id": 7, "corpus_id": 2, "score": 1}],
            "dev": [{"query_id": 7, "corpus_id": 1, "score": 1}],
        },
    )
    pandas.DataFrame([{"id": 2, "text": "b"}, {"id": 3, "text": "c"}]).to_parquet(folder / "more.parquet")
    text = (folder / "README.md").read_text()
    more = "  - split: more\n    path: more.parquet\n- config_name: queries"
    (folder / "README.md").write_text(text.replace("- config_name: queries", more))
    prepare(folder, tmp_path / "out", "--language", "ko", "--splits", "test")
    assert not (tmp_path / "out/ko/dev_queries.jsonl").exists()
    collection = Collection.load(tmp_path / "out", "ko", "test")
    assert (list(collection.passage_ids), collection.qrels) == (["1", "2", "3"], {"7": {"2": 1}})


@pytest.mark.parametrize(
    ("change", "argv", "words"),
    [
        (
            {"prefix": "ko-", "judgements": "ko"},
            (),
            "no configuration corpus; set subset, or another one; it has ko, ko-",
        ),
        ({}, ("--subset", "fa"), "no configuration fa-corpus"),
        ({}, ("--splits", "test"), "--splits: found 'test', expected one of train, dev"),
        ({"qrels": {"dev": [{"query-id": "q9", "corpus-id": "d1", "score": 1}]}}, (), "'q9' is not an id of a query"),
        (
            {"qrels": {"dev": [{"query-id": "q1", "corpus-id": "d1", "score": 0.5}]}},
            (),
            "found 0.5, expected an integer",
        ),
        (
            {"qrels": {"dev": [{"query": "q1", "corpus-id": "d1"}]}},
            (),
            "field 'query-id': missing; there are query, corpus-id",
        ),
        (
            {"queries": [{"_id": "q0", "text": " "}]},
            (),
            "queries, queries 1: field 'text': found ' ', expected a query",
        ),
        ({"corpus": [{"_id": "d 1", "text": "x"}]}, (), "found 'd 1', expected an id without white space"),
        (
            {"corpus": [{"_id": "d1", "text": None}]},
            (),
            "corpus, corpus 1: field 'text': found None, expected a string",
        ),
        ({"corpus": [*CORPUS, CORPUS[0]]}, (), "field '_id': 'd1' stands at "),
    ],
)
def test_faults_name_the_place_and_write_nothing(tmp_path, capsys, change, argv, words):
    folder = repository(tmp_path / "set", **change)
    with pytest.raises(SystemExit) as stop:
        prepare(folder, tmp_path / "out", "--language", "ko", *argv)
    assert stop.value.code == 2
    message = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert words in message
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_data_set_that_cannot_be_reached(tmp_path, capsys):
    with pytest.raises(SystemExit):
        prepare("nobody/nothing", tmp_path / "out", "--language", "ko")
    assert "error: nobody/nothing: the data set cannot be loaded" in capsys.readouterr().err


def test_rows_of_json(tmp_path):
    """As BEIR's own repositories have them."""
    folder = tmp_path / "set"
    folder.mkdir()
    files = {"corpus": CORPUS, "queries": QUERIES, "default": QRELS["dev"]}
    yaml = "configs:\n"
    for config, rows in files.items():
        (folder / f"{config}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        yaml += f"- config_name: {config}\n  data_files:\n  - split: test\n    path: {config}.jsonl\n"
    (folder / "README.md").write_text(f"---\n{yaml}---\n")
    prepare(folder, tmp_path / "out", "--language", "ko")
    assert Collection.load(tmp_path / "out", "ko", "test").qrels == {"q1": {"d2": 2, "d1": 0}}
