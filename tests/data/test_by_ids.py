"""MS MARCO's triples of ids; the lines are of its files' shape."""

import json

import pytest

from clpl_moe.common.errors import UserError
from clpl_moe.common.files import read_jsonl
from clpl_moe.convert import convert
from clpl_moe.data.dataset import CLPLTrainDataset
from clpl_moe.data.formats import data_files
from clpl_moe.data.schema import checked_lines, read_examples
from clpl_moe.train.arguments import CLPLDataArguments

QUERIES = "1185869\t)what was the impact of the manhattan project?\n1185868\t_________ justice is designed to repair\n"
CORPUS = [
    "The presence of communication amid scientific minds was important.",
    "The Manhattan Project and its atomic bomb helped end World War II.",
    'Essay on "The Manhattan Project',
    "원자 폭탄은 1945년에 만들어졌다.",
]


@pytest.fixture
def marco(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "queries.train.tsv").write_text(QUERIES, encoding="utf-8")
    lines = "".join(f"{number}\t{text}\n" for number, text in enumerate(CORPUS))
    (tmp_path / "collection.tsv").write_text(lines, encoding="utf-8")
    return tmp_path


def entry(name):
    return f"{name},queries=queries.train.tsv,corpus=collection.tsv"


def read(name):
    return [(e["query"], e["pos"], e["neg"]) for file in data_files([entry(name)]) for e in read_examples(file)]


def faults(name):
    return [
        f"{line.place}: {f}" for file in data_files([entry(name)]) for line in checked_lines(file) for f in line.faults
    ]


EXPECTED = [
    (QUERIES[8:].splitlines()[0], [CORPUS[0]], [CORPUS[3]]),
    (QUERIES.splitlines()[1][8:], [CORPUS[2]], [CORPUS[1]]),
]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("qidpidtriples.train.full.2.tsv", "1185869\t0\t3\n1185868\t2\t1\n"),
        ("triples.txt", "\ufeff1185869 0 3\r\n\n1185868 2 1\r\n"),
        ("triples.jsonl", '[1185869, 0, 3]\n["1185868", 2, 1]\n'),  # ColBERT's
    ],
)
def test_triples_of_ids(marco, name, content):
    (marco / name).write_text(content, encoding="utf-8")
    assert read(name) == EXPECTED
    dataset = CLPLTrainDataset(CLPLDataArguments(train_data=[entry(name)], cache_path="cache", train_group_size=2))
    assert dataset[(0, 0)].passages == [CORPUS[0], CORPUS[3]]
    done = convert(train_data=[entry(name)], to="jsonl", output="own.jsonl")
    (_, first), _ = read_jsonl(done.path)
    assert (first["query_id"], first["pos_ids"], first["neg_ids"]) == ("1185869", ["0"], ["3"])


def test_the_tables_are_not_replaced_even_if_asked(marco):
    (marco / "t.tsv").write_text("1185869\t0\t3\n")
    options = {"to": "sentence_transformers", "output": "collection.tsv", "overwrite": True}
    with pytest.raises(UserError, match=r"collection\.tsv: this command reads the file"):
        convert(train_data=[entry("t.tsv")], **options)


def test_judgements_are_pairs(marco):
    (marco / "qrels.train.tsv").write_text("1185869\t0\t0\t1\n1185868\t0\t2\t1\n1185868\t0\t3\t0\n")
    assert read("qrels.train.tsv") == [(query, pos, []) for query, pos, _ in EXPECTED]
    (marco / "bad.tsv").write_text("1185869\t0\t0\t1\n1185868\t0\t2\n")
    (fault,) = faults("bad.tsv")
    assert fault.startswith(
        "bad.tsv:2: found '1185868 0 2', expected a query's id, 0, a passage's id and a whole number"
    )


def test_ids_without_texts_are_told_of(marco):
    (marco / "t.tsv").write_text("1\t0\t3\n1185868\t2\t9\t8\n1185869\n{}\n1185868\t2\n")
    (marco / "t.jsonl").write_text("[1185869, 0]\n[1185869, 0, [3]]\n{}\n")
    assert faults("t.tsv") == [
        "t.tsv:1: field 'query': no text of id '1' in the file queries=",
        "t.tsv:2: field 'pos' or 'neg': no text of id '9', '8' in the file corpus=",
        "t.tsv:3: found 1 id, expected those of a query, a positive and negatives",
        "t.tsv:4: found 1 id, expected those of a query, a positive and negatives",
    ]
    wanted = "found no ids, expected those of a query, a positive and negatives"
    assert faults("t.jsonl") == [
        f"t.jsonl:2: {wanted}",
        "t.jsonl:3: found 1 id, expected those of a query, a positive and negatives",
    ]


def test_tables_that_cannot_be_read(marco):
    (marco / "t.tsv").write_text("1185869\t0\t3\n")
    with (marco / "collection.tsv").open("a") as file:
        file.write("4\thttp://x\ta title\ta text\n")
    with pytest.raises(UserError, match=r"collection\.tsv:5: found 4 cells, expected an id, a tab and a text"):
        read("t.tsv")
    (marco / "c.tsv.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"c\.tsv\.gz: texts are read here and there in this file; decompress it first"):
        [*data_files(["t.tsv,queries=queries.train.tsv,corpus=c.tsv.gz"])[0].lines()]


def test_a_changed_table_is_read_again(marco):
    """Stored examples go by the content of all three files."""
    (marco / "t.tsv").write_text("1185869\t0\t3\n")
    args = CLPLDataArguments(train_data=[entry("t.tsv")], cache_path="cache", train_group_size=2)
    assert CLPLTrainDataset(args)[(0, 0)].passages[1] == CORPUS[3]
    (marco / "collection.tsv").write_text("".join(f"{n}\tnew {n}\n" for n in range(4)))
    assert CLPLTrainDataset(args)[(0, 0)].passages == ["new 0", "new 3"]


def test_many_ids(marco):
    """Each is found by its hash, whatever its place."""
    (marco / "collection.tsv").write_text("".join(f"{n}\ttext {n}\n" for n in range(5000, 0, -1)))
    (marco / "t.jsonl").write_text("".join(json.dumps([1185868, n, 5001 - n]) + "\n" for n in range(1, 5001, 7)))
    for n, (_, pos, neg) in zip(range(1, 5001, 7), read("t.jsonl"), strict=True):
        assert (pos, neg) == ([f"text {n}"], [f"text {5001 - n}"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("triples.tsv", "the ids of a query, a positive and negatives a line"),
        ("collection.tsv", "an id, a tab and a text a line"),
    ],
)
def test_an_empty_file_is_told_of_as_what_it_is(marco, name, expected):
    (marco / "triples.tsv").write_text("1185869\t0\t1\n")
    (marco / name).write_text("\n")
    with pytest.raises(UserError, match=f"{name}: the file is empty, expected {expected}"):
        read("triples.tsv")
