"""What is written is read by the tool that it is for, or as that tool would read it, and comes back the same."""

import json
from datetime import datetime, timezone
from decimal import Decimal
from pathlib import Path

import datasets
import pandas
import pyarrow.parquet
import pytest

from clpl_moe.common.errors import UserError
from clpl_moe.common.files import read_jsonl, write_jsonl
from clpl_moe.convert import convert
from clpl_moe.convert.__main__ import main
from clpl_moe.data.schema import read_examples
from clpl_moe.prepare import prepare
from clpl_moe.retrieval.collection import Collection
from helpers.tiny_training import make_collection, make_triplets, write_triplets
from helpers.tools import need_tool

BEIR = Path(__file__).parents[1] / "fixtures" / "beir"  # written by beir 2.2


def lines(path):
    return [record for _, record in read_jsonl(path)]


def texts(path):
    return [(e["query"], e["pos"], e["neg"]) for e in read_examples(path)]


@pytest.fixture
def own(tmp_path):
    return write_triplets(tmp_path / "own.jsonl", 12)


@pytest.fixture
def uneven(tmp_path):
    records = [{"query": f"q{n}", "pos": [f"p{n}"], "neg": [f"n{n}{i}" for i in range(n)]} for n in range(4)]
    write_jsonl(tmp_path / "uneven.jsonl", records)
    return tmp_path / "uneven.jsonl"


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".tsv", ".jsonl"])
def test_columns_of_sentence_transformers_and_back(own, tmp_path, ending):
    table = tmp_path / f"st{ending}"
    converted = convert(train_data=[own], output=table, to="sentence_transformers")
    assert converted.counts == {"negatives of each row": 4, "lines": 12, "rows": 18}
    kind = {".tsv": "csv", ".jsonl": "json"}.get(ending, ending[1:])
    how = {"sep": "\t"} if ending == ".tsv" else {}
    rows = datasets.load_dataset(kind, data_files=str(table), split="train", cache_dir=str(tmp_path / "c"), **how)
    assert rows.column_names == ["anchor", "positive", *(f"negative_{n}" for n in range(1, 5))]
    back = convert(train_data=[table], output=tmp_path / "back.jsonl", to="jsonl")
    assert back.counts == {"lines": 18}
    wanted = [(line["query"], [pos], line["neg"]) for line in make_triplets(12) for pos in line["pos"]]
    assert texts(tmp_path / "back.jsonl") == wanted


@pytest.mark.parametrize("ending", [".parquet", ".csv", ".tsv", ".jsonl"])
def test_ends_of_lines_of_any_kind_within_texts_come_back(tmp_path, ending):
    line = {"query": "a\rb", "pos": ["\rc"], "neg": ["d\r\ne", "f\ng\t\u2028h", 'i\r"j']}
    write_jsonl(tmp_path / "own.jsonl", [line, line])
    table = tmp_path / f"st{ending}"
    convert(train_data=[tmp_path / "own.jsonl"], output=table, to="sentence_transformers")
    convert(train_data=[table], output=tmp_path / "back.jsonl", to="jsonl")
    assert texts(tmp_path / "back.jsonl") == [tuple(line.values())] * 2
    if ending in (".csv", ".tsv"):
        read = pandas.read_csv(table, sep="\t" if ending == ".tsv" else ",")
        assert read.values.tolist() == [[line["query"], *line["pos"], *line["neg"]]] * 2


@pytest.mark.slow
def test_a_table_trains_with_sentence_transformers(tiny_encoder, own, tmp_path):
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    convert(train_data=[own], output=tmp_path / "st.parquet", to="sentence_transformers", negatives=2)
    model = SentenceTransformer(str(tiny_encoder), device="cpu")
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_parquet(str(tmp_path / "st.parquet"), cache_dir=str(tmp_path / "cache")),
        loss=MultipleNegativesRankingLoss(model),
    )
    assert trainer.train().training_loss > 0


def test_columns_of_a_table_that_json_has_no_form_for_become_texts(tmp_path):
    day = datetime(2024, 1, 31, 12, 30, tzinfo=timezone.utc)
    other = {"at": day, "day": day.date(), "time": day.time(), "price": Decimal("1.50"), "image": b"\xff\0", "ids": [7]}
    row = {"query": "q", "pos": ["p"], "neg": ["n"], **other, "in": {"day": day.date()}}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "own.parquet")
    convert(train_data=[tmp_path / "own.parquet"], output=tmp_path / "own.jsonl", to="jsonl")
    (line,) = lines(tmp_path / "own.jsonl")
    assert {name: line[name] for name in other} == {
        **{"at": "2024-01-31 12:30:00+00:00", "day": "2024-01-31", "time": "12:30:00", "price": "1.50"},
        **{"image": "/wA=", "ids": [7]},
    }
    assert line["in"] == {"day": "2024-01-31"}


def test_lines_with_fewer_negatives_are_left_out_and_counted(uneven, tmp_path):
    out = tmp_path / "st.jsonl"
    counts = convert(train_data=[uneven], output=out, to="sentence_transformers").counts
    assert counts == {"lines": 4, "rows": 4, "negatives left out": 6}  # one line has none
    assert lines(out)[1] == {"anchor": "q1", "positive": "p1"}
    given = {"train_data": [uneven], "output": out, "to": "sentence_transformers", "overwrite": True}
    counts = convert(**given, negatives=1).counts
    assert counts == {
        **{"negatives of each row": 1, "lines": 3, "rows": 3},
        **{"negatives left out": 3, "lines left out: fewer negatives": 1},
    }
    assert lines(out)[0] == {"anchor": "q1", "positive": "p1", "negative": "n10"}


def test_flag_embedding_reads_what_is_written_for_it(own, tmp_path):
    from clpl_moe.data.flag_embedding import AbsEmbedderDataArguments, AbsEmbedderTrainDataset

    convert(train_data=[own], output=tmp_path / "fe.jsonl", to="flag_embedding")
    assert set(lines(tmp_path / "fe.jsonl")[0]) == {"query", "pos", "neg"}
    arguments = AbsEmbedderDataArguments(
        train_data=[str(tmp_path / "fe.jsonl")], cache_path=str(tmp_path / "cache"), train_group_size=3
    )
    theirs = AbsEmbedderTrainDataset(arguments, tokenizer=None)
    assert len(theirs) == 12
    query, passages, _ = theirs[0]
    first = make_triplets(12)[0]
    assert (query, passages[0], set(passages[1:]) <= set(first["neg"])) == (first["query"], first["pos"][0], True)


def test_beirs_folder_and_back(uneven, tmp_path):
    """By way of a collection; negatives are judged and not relevant."""
    counts = convert(train_data=[uneven], output=tmp_path / "set", to="beir").counts
    assert counts == {
        "passages": 10, "queries": 4, "train judgements: relevant": 4, "train judgements: not relevant": 6,
    }  # fmt: skip
    prepare(beir=tmp_path / "set", output=tmp_path / "out", language="en")
    back = convert(collection=tmp_path / "out", language="en", output=tmp_path / "back.jsonl", to="jsonl")
    assert back.counts == {"lines": 4}
    assert texts(tmp_path / "back.jsonl") == texts(uneven)


def test_beirs_own_loader_reads_the_folder(uneven, tmp_path):
    loader = need_tool("beir.datasets.data_loader")
    convert(train_data=[uneven], output=tmp_path / "set", to="beir")
    corpus, queries, qrels = loader.GenericDataLoader(str(tmp_path / "set")).load(split="train")
    assert (len(corpus), len(queries), qrels["q2"]) == (10, 4, {"p2": 1, "p3": 0})


def test_ids_of_the_lines_are_kept_where_they_can_be(tmp_path):
    records = [
        {"query_id": "a", "query": "q", "pos": ["p"], "pos_ids": ["x"], "neg": ["n", "m"], "neg_ids": ["x", "p3"]},
        {"query_id": "a", "query": "r", "pos": ["p"], "pos_ids": ["y"], "neg": ["o"], "neg_ids": ["b c"]},
    ]
    write_jsonl(tmp_path / "t.jsonl", records)
    convert(train_data=[tmp_path / "t.jsonl"], output=tmp_path / "set", to="beir")
    assert {line["_id"]: line["text"] for line in lines(tmp_path / "set/corpus.jsonl")} == {
        "x": "p", "p2": "n", "p3": "m", "p4": "o",
    }  # fmt: skip
    assert {line["_id"]: line["text"] for line in lines(tmp_path / "set/queries.jsonl")} == {"a": "q", "q2": "r"}
    tsv = pandas.read_csv(tmp_path / "set/qrels/train.tsv", sep="\t")
    assert list(tsv.itertuples(index=False, name=None)) == [
        ("a", "x", 1), ("a", "p2", 0), ("a", "p3", 0), ("q2", "x", 1), ("q2", "p4", 0),
    ]  # fmt: skip


@pytest.mark.parametrize("to", ["beir", "mteb"])
def test_a_collection_as_beirs_and_mtebs_folder_and_back(tmp_path, to):
    prepare(beir=BEIR, output=tmp_path / "first", language="ko")
    before = Collection.load(tmp_path / "first", "ko", "test")
    counts = convert(collection=tmp_path / "first", language="ko", output=tmp_path / "set", to=to).counts
    assert counts == {"passages": 3, "queries": 2, "test judgements: relevant": 2, "test judgements: not relevant": 1}
    prepare(**{"beir" if to == "beir" else "hub": tmp_path / "set"}, output=tmp_path / "again", language="ko")
    after = Collection.load(tmp_path / "again", "ko", "test")
    assert after.fingerprint() == before.fingerprint()
    assert after.titled == 1
    assert before.qrels == {"q-1": {"d-1": 2, "d-3": 0}, "q-2": {"d-2": 1}}
    if to == "mteb":
        assert datasets.get_dataset_config_names(str(tmp_path / "set")) == ["corpus", "queries", "default"]


def test_a_query_without_a_relevant_passage_is_no_training_line(tmp_path):
    make_collection(tmp_path, 3)
    write_jsonl(tmp_path / "ko/dev_qrels.jsonl", [{"qid": "q0", "docid": "p0", "relevance": 1}])
    with pytest.warns(UserWarning, match="2 queries have no line here"):
        found = convert(collection=tmp_path, language="ko", output=tmp_path / "t.jsonl", to="jsonl", splits=["dev"])
    assert found.counts == {"lines": 1, "queries left out: no relevant passage": 2}


def test_judged_passages_without_text_are_in_no_training_line(tmp_path):
    make_collection(tmp_path, 3)
    empty = [{"id": "e1", "text": ""}, {"id": "e2", "title": " ", "text": "\u3000"}]
    write_jsonl(tmp_path / "ko/corpus.jsonl", [*lines(tmp_path / "ko/corpus.jsonl"), *empty])
    judged = [("q0", "p0", 1), ("q0", "e1", 1), ("q0", "e2", 0), ("q1", "e2", 1), ("q2", "p2", 1)]
    write_jsonl(tmp_path / "ko/dev_qrels.jsonl", ({"qid": q, "docid": p, "relevance": r} for q, p, r in judged))
    options = {"collection": tmp_path, "language": "ko", "to": "jsonl", "splits": ["dev"]}
    counts = convert(output=tmp_path / "t.jsonl", **options).counts
    assert counts == {
        "lines": 2,
        "judged passages left out: empty": 3,
        "queries left out: no relevant passage": 1,
    }
    assert [line["pos_ids"] for line in lines(tmp_path / "t.jsonl")] == [["p0"], ["p2"]]
    assert len(texts(tmp_path / "t.jsonl")) == 2  # as training reads them
    write_jsonl(tmp_path / "ko/dev_qrels.jsonl", [{"qid": "q1", "docid": "e2", "relevance": 1}])
    with (
        pytest.warns(match="have no line here"),
        pytest.raises(UserError, match="no line is left: no query of dev has"),
    ):
        convert(output=tmp_path / "none.jsonl", **options)
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--to", "jsonl", "--output", "x.jsonl"], "expected either train_data or a collection"),
        (
            ["--to", "mteb", "--output", "x", "--train_data", "own.jsonl"],
            "--to: found mteb, expected one of jsonl, flag",
        ),
        (
            ["--to", "jsonl", "--output", "x.csv", "--train_data", "own.jsonl"],
            "--output: found 'x.csv', expected a name",
        ),
        (["--to", "jsonl", "--output", "own.jsonl", "--train_data", "own.jsonl"], "own.jsonl"),
        (
            ["--to", "jsonl", "--output", "own.jsonl", "--train_data", "own.jsonl", "--overwrite", "true"],
            "own.jsonl: this command reads the file; name another output",
        ),
        (["--to", "beir", "--output", "x", "--collection", "c"], "--language: missing"),
        (
            ["--to", "beir", "--output", "x", "--collection", "c", "--language", "ko"],
            "c: no such folder of collections",
        ),
        (
            ["--to", "flag_embedding", "--output", "x.jsonl", "--train_data", "uneven.jsonl"],
            "uneven.jsonl:1: field 'neg'",
        ),
        (
            ["--to", "sentence_transformers", "--output", "x.csv", "--train_data", "own.jsonl", "--negatives", "9"],
            "no row is left",
        ),
        (
            ["--to", "jsonl", "--output", "x.jsonl", "--train_data", "own.jsonl", "--negatives", "9"],
            "--negatives: goes with to sentence_transformers, not with jsonl",
        ),
        (["--to", "beir", "--output", "x", "--train_data", "bad.jsonl"], "bad.jsonl:1: field 'pos'"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(own, uneven, tmp_path, monkeypatch, capsys, argv, words):
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text('{"query": "q", "pos": []}\n')
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    assert not [path for path in tmp_path.iterdir() if path not in before]


def test_the_command_prints_what_it_wrote(own, tmp_path, capsys):
    main([*("--to", "jsonl", "--output", str(tmp_path / "a.jsonl"), "--train_data", str(own))])
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {tmp_path / 'a.jsonl'}"
    assert [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()] == make_triplets(12)
