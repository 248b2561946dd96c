import csv
import json

import pytest

from helpers.evaluating import changed_copy, make_collection, read_csv, run


def rows(output):
    return {(row["language"], row["query_id"]): row for row in read_csv(output / "per_query.csv")}


def set_queries(collections, texts):
    """Replace the texts of the first Korean dev queries."""
    path = collections / "ko" / "dev_queries.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record, text in zip(records, texts):
        record["text"] = text
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def pairs(output):
    found = json.loads((output / "significance.json").read_text())["comparisons"]
    return {(c["language"], c["first"], c["second"]) for c in found}


@pytest.fixture
def models(tiny_encoder, tmp_path):
    return [tiny_encoder, *(changed_copy(tiny_encoder, tmp_path / "models" / name) for name in ("second", "third"))]


def test_other_languages_stay(tiny_encoder, collections, tmp_path):
    output = tmp_path / "out"
    run(tiny_encoder, collections, output)
    ko = rows(output)
    run(tiny_encoder, collections, output, languages=("fa",), top_k=7)
    both = rows(output)
    assert {key: both[key] for key in ko} == ko
    assert {language for language, _ in both} == {"ko", "fa"}
    assert len(both) == 16
    assert next(iter(both))[0] == "fa"
    assert not (output / "significance.json").exists()


def test_other_models_stay_as_long_as_their_results(models, collections, tmp_path):
    output = tmp_path / "out"
    first, second, third = models
    run([first, second], collections, output, languages=("ko", "fa"))
    before = rows(output)
    run([first, third], collections, output)
    after = rows(output)
    assert {key: {name: after[key][name] for name in row} for key, row in before.items()} == before
    assert after["ko", "q1"]["nDCG@10 third"]
    assert after["fa", "q1"]["nDCG@10 third"] == ""
    assert pairs(output) == {("ko", "tiny", "second"), ("fa", "tiny", "second"), ("ko", "tiny", "third")}
    # Other content: what came of the old one goes.
    make_collection(collections, "ko", copies=2)
    run([first, third], collections, output, overwrite="true")
    assert pairs(output) == {("ko", "tiny", "third"), ("fa", "tiny", "second")}
    assert rows(output)["ko", "q1"]["nDCG@10 second"] == ""
    assert rows(output)["fa", "q1"] == after["fa", "q1"]


def test_results_that_were_replaced_leave_no_column(models, collections, tmp_path):
    """A single model's results lie in the folder of the language."""
    output = tmp_path / "out"
    run(models[0], collections, output)
    run(models[1], collections, output, overwrite="true")
    assert "nDCG@10 second" in rows(output)["ko", "q1"]
    assert "nDCG@10 tiny" not in rows(output)["ko", "q1"]
    run(models[:2], collections, output)
    assert list(rows(output)["ko", "q1"])[3:5] == ["nDCG@5 tiny", "nDCG@5 second"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("significance.json", '{"my": "own"}'),
        ("significance.json", "not JSON"),
        ("significance.json", '{"comparisons": [1]}'),
        ("per_query.csv", "query,answer\n"),
        ("per_query.csv", "language,query_id,query,\xff"),
        ("per_query.csv", 'language,query_id,query,a\nko,q1,"x\n'),
        ("ko/qrels.trec", "q1 0 p1 1\n"),
        ("ko/run.trec", ""),
        ("ko/run.sparse.trec", ""),
        ("ko/metrics.m3.json", "{}"),
        ("ko/metrics.json", "{}"),
        ("_clpl_moe/notes.txt", ""),
    ],
)
def test_files_of_others_are_named_and_stay(tiny_encoder, collections, tmp_path, capsys, name, content):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(SystemExit) as stop:
        run(tiny_encoder, collections, tmp_path / "out")
    assert stop.value.code == 2
    assert str(path.parent if "_clpl" in name else path) in capsys.readouterr().err
    assert path.read_bytes() == content.encode("latin-1")
    assert [p for p in (tmp_path / "out").rglob("*") if p.is_file()] == [path]


@pytest.mark.parametrize("name", ["out/ko/.embeddings", "out/.embeddings", "out.embeddings"])
def test_folders_that_were_once_taken_for_embeddings_stay(tiny_encoder, collections, tmp_path, name):
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / "mine.npy").write_text("")
    run(tiny_encoder, collections, tmp_path / "out")
    assert (tmp_path / name / "mine.npy").exists()


def test_a_query_longer_than_the_limit_of_a_cell(tiny_encoder, collections, tmp_path):
    long = "red house " * 20_000
    set_queries(collections, [long])
    csv.field_size_limit(131_072)
    run(tiny_encoder, collections, tmp_path / "out")
    run(tiny_encoder, collections, tmp_path / "out", languages=("fa",))
    assert rows(tmp_path / "out")["ko", "q0"]["query"] == long


def test_a_query_of_several_lines_of_any_kind(tiny_encoder, collections, tmp_path):
    odd = ["red\rhouse", "red\r\nhouse\r", "red\nhouse", "red\u2028house"]
    set_queries(collections, odd)
    for language in ("ko", "fa"):
        run(tiny_encoder, collections, tmp_path / "out", languages=(language,))
        assert [rows(tmp_path / "out")["ko", f"q{i}"]["query"] for i in range(4)] == odd


def test_a_query_that_a_spreadsheet_would_run_is_text(tiny_encoder, collections, tmp_path):
    """And comes back as it was where a later call keeps its row."""
    hostile = ["=cmd|'/c calc'!A1", "'=1+1", "-2", "@SUM(A1)"]
    set_queries(collections, hostile)
    run(tiny_encoder, collections, tmp_path / "out")
    before = rows(tmp_path / "out")
    assert [before["ko", f"q{i}"]["query"] for i in range(4)] == [f"'{text}" for text in hostile]
    run(tiny_encoder, collections, tmp_path / "out", languages=("fa",))
    after = rows(tmp_path / "out")
    assert {key: after[key] for key in before} == before
