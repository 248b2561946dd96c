"""Every format is read from a file that its own tool has written."""

import codecs
import gc
import gzip
import json
import re
import shutil
from pathlib import Path

import datasets
import pandas
import pytest

from clpl_moe.common.errors import UserError
from clpl_moe.common.files import write_jsonl
from clpl_moe.data.dataset import CLPLTrainDataset
from clpl_moe.data.formats import DataFile, data_files
from clpl_moe.data.schema import checked_lines, read_examples
from clpl_moe.train.arguments import CLPLDataArguments
from helpers.tiny_training import make_triplets, write_triplets
from helpers.tools import need_tool

# EmbeddingQAFinetuneDataset.save_json of llama-index-finetuning 0.4.2.
LLAMA_INDEX = Path(__file__).parents[1] / "fixtures" / "llama_index.json"
ROWS = {
    "anchor": ["다리는 언제 열렸나요?", 'Who said "no"?', "پل کی باز شد؟"],
    "positive": ["1932년에 열렸다.", 'She said "no", and\nleft.', "در سال ۱۹۳۲."],
    "negative_1": ["007", "NA", "برج"],
    "negative_2": ["탑", None, "null"],
}


def read(entry):
    return [example for file in data_files([str(entry)]) for example in read_examples(file)]


def texts(examples):
    return [(e["query"], e["pos"], e["neg"]) for e in examples]


def expected():
    rows = zip(*ROWS.values())
    return [(query, [pos], [n for n in negatives if n is not None]) for query, pos, *negatives in rows]


def faults(entry):
    return [
        f"{line.place}: {f}" for file in data_files([str(entry)]) for line in checked_lines(file) for f in line.faults
    ]


def as_csv(path):
    pandas.DataFrame(ROWS).to_csv(path, index=False)


def as_semicolons(path):
    pandas.DataFrame(ROWS).to_csv(path, index=False, sep=";", encoding="utf-8-sig")


def as_tsv(path):
    pandas.DataFrame(ROWS).to_csv(path, index=False, sep="\t")


def as_parquet(path):
    pandas.DataFrame(ROWS).to_parquet(path)


def as_parquet_of_datasets(path):
    datasets.Dataset.from_dict(ROWS).to_parquet(path)


def as_feather(path):
    pandas.DataFrame(ROWS).to_feather(path)


def as_lines(path):
    datasets.Dataset.from_dict(ROWS).to_json(path, force_ascii=False)


def as_list(path):
    pandas.DataFrame(ROWS).to_json(path, orient="records")


def as_pretty_list(path):
    pandas.DataFrame(ROWS).to_json(path, orient="records", indent=2)


def as_csv_with_its_index(path):
    pandas.DataFrame(ROWS).to_csv(path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("t.csv", as_csv),
        ("t.csv", as_csv_with_its_index),
        ("t.CSV", as_semicolons),
        ("t.csv.gz", as_csv),
        ("t.tsv", as_tsv),
        ("t.parquet", as_parquet),
        ("t.parquet", as_parquet_of_datasets),
        ("t.arrow", as_feather),
        ("t.jsonl", as_lines),
        ("t.jsonl.gz", as_lines),
        ("t.JSON", as_list),
        ("t.json", as_pretty_list),
    ],
    ids=lambda v: v if isinstance(v, str) else v.__name__,
)
def test_tables_of_pandas_and_datasets(tmp_path, name, write):
    write(tmp_path / name.lower())
    (tmp_path / name.lower()).rename(tmp_path / name)
    assert texts(read(tmp_path / name)) == expected()


def test_our_own_lines_as_parquet_and_compressed(tmp_path):
    path, records = tmp_path / "t.jsonl", make_triplets(12, neg_scores=[0.1, 0.2, 0.3, 0.4])
    for record in records:
        record["pos_scores"] = [0.5] * len(record["pos"])
    write_jsonl(path, records)
    for record in records:  # a column of a table has one type
        record["neg_q"] = [[q] if isinstance(q, str) else q for q in record["neg_q"]]
    wanted = list(read_examples(path))
    datasets.Dataset.from_list(records).to_parquet(tmp_path / "t.parquet")
    assert list(read_examples(tmp_path / "t.parquet")) == wanted
    assert next(read_examples(tmp_path / "t.parquet", with_scores=True))["pos_scores"] == [0.5]
    with gzip.open(tmp_path / "t.jsonl.gz", "wb") as file:
        file.write(path.read_bytes())
    assert list(read_examples(tmp_path / "t.jsonl.gz")) == wanted


def test_zstandard(tmp_path):
    zstandard = need_tool("zstandard")
    path = write_triplets(tmp_path / "t.jsonl", 12)
    packed = tmp_path / "t.jsonl.zst"
    packed.write_bytes(zstandard.compress(path.read_bytes()))
    assert list(read_examples(packed)) == list(read_examples(path))
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"t\.jsonl\.zst"):
        list(read_examples(packed))


def test_zstandard_without_its_library_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("clpl_moe.common.compressed._zstandard", lambda: None)
    (tmp_path / "t.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(UserError, match=r"t\.jsonl\.zst: reading \.zst needs a library: pip install zstandard"):
        read(tmp_path / "t.jsonl.zst")


def test_damaged_compression_names_the_line(tmp_path):
    path = write_triplets(tmp_path / "t.jsonl", 500)
    packed = gzip.compress(path.read_bytes())
    (tmp_path / "t.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(UserError, match=r"t\.jsonl\.gz:\d+: the file ends too early"):
        read(tmp_path / "t.jsonl.gz")


def test_a_mark_may_stand_at_any_line(tmp_path):
    """Files that were joined have one in the middle."""
    line = json.dumps({"query": "q", "pos": ["p"], "neg": ["n"]}).encode() + b"\n"
    (tmp_path / "t.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\xef\xbb\xbf" + line + b"\xef\xbb\xbf\n")
    assert len(read(tmp_path / "t.jsonl")) == 2
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbfquery,pos\na,b\n\xef\xbb\xbfc,d\n")
    assert texts(read(tmp_path / "t.csv")) == [("a", ["b"], []), ("c", ["d"], [])]


def test_a_folder_that_datasets_saved(tmp_path):
    """With what it leaves there when it works on the data."""
    saved = tmp_path / "saved"
    datasets.Dataset.from_dict(ROWS).save_to_disk(saved, num_shards=2)
    datasets.load_from_disk(saved).map(lambda row: {"anchor": "changed"}, cache_file_name=str(saved / "cache-1.arrow"))
    with pytest.warns(UserWarning, match="left out of the training data: cache-1.arrow, dataset_info.json, state.json"):
        assert texts(read(saved)) == expected()
    data_file = saved / json.loads((saved / "state.json").read_text())["_data_files"][0]["filename"]
    data_file.unlink()
    with pytest.raises(UserError, match=r"arrow: no such file, which state.json names"):
        read(saved)


def test_a_folder_of_several_splits(tmp_path):
    rows = datasets.Dataset.from_dict(ROWS)
    datasets.DatasetDict({"train": rows, "dev": rows.select([1])}).save_to_disk(tmp_path / "all")
    with pytest.warns(UserWarning, match="left out of the training data"):
        assert texts(read(tmp_path / "all")) == expected()
    with pytest.warns(UserWarning, match="left out of the training data"):
        assert texts(read(f"{tmp_path / 'all'},split=dev")) == expected()[1:2]
    with pytest.raises(UserError, match="all: no split 'test'; it has train, dev"):
        read(f"{tmp_path / 'all'},split=test")


def test_a_split_of_a_folder_without_splits(tmp_path):
    rows = datasets.Dataset.from_dict(ROWS)
    rows.save_to_disk(tmp_path / "plain")
    with pytest.raises(
        UserError, match="plain,split=train: found split=train, .*; this folder is one data set, leave it out"
    ):
        read(f"{tmp_path / 'plain'},split=train")
    datasets.DatasetDict({"dev": rows}).save_to_disk(tmp_path / "all")
    with pytest.warns(UserWarning, match="left out of the training data"):
        assert texts(read(f"{tmp_path / 'all'},split=dev")) == expected()
    with pytest.raises(UserError, match=r"all: no split 'train'; it has dev: set .*all,split=NAME"):
        read(tmp_path / "all")
    rows = datasets.Dataset.from_dict(ROWS, split="train")
    rows.save_to_disk(tmp_path / "train")
    with pytest.warns(UserWarning, match="left out of the training data"):
        assert texts(read(f"{tmp_path / 'train'},split=train")) == expected()
    with pytest.raises(UserError, match=r"this folder is one data set \(of train\), leave it out"):
        read(f"{tmp_path / 'train'},split=dev")


@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.jsonl.gz"])
def test_a_folder_in_beirs_layout_is_no_training_data(tmp_path, name):
    for path in ("queries.jsonl", "qrels/train.tsv", name):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text("x")
    with pytest.raises(
        UserError, match=f"a folder in BEIR's layout, .* prepare --beir {re.escape(str(tmp_path))} makes"
    ):
        read(tmp_path)


def test_a_collection_is_no_training_data(tmp_path):
    for path in ("corpus.jsonl", "train_queries.jsonl", "train_qrels.jsonl"):
        (tmp_path / "ko" / path).parent.mkdir(exist_ok=True)
        (tmp_path / "ko" / path).write_text("x")
    for folder in (tmp_path, tmp_path / "ko"):
        with pytest.raises(
            UserError, match=f"{folder}: a collection, .*mine --collection {tmp_path} --language ko makes"
        ):
            read(folder)


def test_every_file_of_a_folder_is_read_or_named(tmp_path):
    folder = tmp_path / "data"
    triplets = write_triplets(tmp_path / "a.jsonl", 3)
    folder.mkdir()
    for name in ("a.jsonl", "E.JSONL", "c.json"):
        shutil.copy(triplets, folder / name)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(triplets.read_bytes()))
    as_csv(folder / "d.csv")
    for name in ("dataset_info.json", "README.md", ".hidden.jsonl", "sub/x.jsonl", ".git/config"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    with pytest.warns(UserWarning, match="left out") as warned:
        found = data_files([str(folder)])
    assert [Path(file.name).name for file in found] == ["E.JSONL", "a.jsonl", "b.jsonl.gz", "c.json", "d.csv"]
    assert str(warned[0].message).endswith("data: .hidden.jsonl, README.md, dataset_info.json, sub/")
    args = CLPLDataArguments(train_data=[str(folder)], cache_path=str(tmp_path / "cache"))
    with pytest.warns(UserWarning, match="left out"):
        assert CLPLTrainDataset(args).part_sizes == [3] * 5


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_folder_whose_data_lie_in_another_names_that(tmp_path):
    (tmp_path / "repo" / "data").mkdir(parents=True)
    as_parquet(tmp_path / "repo" / "data" / "train-00000.parquet")
    with pytest.raises(UserError, match=f"folders within it are not read, name {tmp_path}/repo/data$"):
        read(tmp_path / "repo")


def test_reading_that_ends_early_leaves_nothing_behind(tmp_path, monkeypatch):
    """Not even an error in a generator that Python can only print."""
    found = []
    monkeypatch.setattr("sys.unraisablehook", found.append)
    as_csv(tmp_path / "t.csv")
    lines = data_files([str(tmp_path / "t.csv")])[0].lines()
    next(lines)
    lines.close()
    gc.collect()
    assert found == []


def test_llama_index(tmp_path):
    examples = read(LLAMA_INDEX)
    assert texts(examples)[:2] == [
        (
            "When was the bridge opened?",
            ["The bridge over the river was opened in 1932.", "그 다리는 1932년에 열렸다."],
            [],
        ),
        ("다리는 언제 열렸나요?", ["그 다리는 1932년에 열렸다."], []),
    ]
    content = json.loads(LLAMA_INDEX.read_text())
    (tmp_path / "one_line.json").write_text(json.dumps(content))
    assert read(tmp_path / "one_line.json") == examples
    content["relevant_docs"]["q-1"] = ["node-9"]
    (tmp_path / "t.json").write_text(json.dumps(content))
    assert faults(tmp_path / "t.json") == [
        f"{tmp_path}/t.json: query 'q-1': field 'relevant_docs': passages ['node-9'] not found, expected ids of 'queries'"
        " and 'corpus'"
    ]


def test_triples_without_a_line_of_names(tmp_path):
    path = tmp_path / "triples.tsv"
    path.write_text('what is "x\tit is "x"\tno, it is y\nwhen\tnow\tnever\n', encoding="utf-8")
    wanted = [('what is "x', ['it is "x"'], ["no, it is y"]), ("when", ["now"], ["never"])]
    assert texts(read(f"{path},header=false")) == wanted
    with pytest.raises(UserError, match=r"found the columns .*; expected query and pos.*triples.tsv,header=false"):
        read(path)


TEVATRON = [
    {
        "query_id": "7",
        "query": "다리는 언제 열렸나요?",
        "answers": ["1932년"],
        "positive_passages": [{"docid": "p1", "title": "다리", "text": "1932년에 열렸다."}],
        "negative_passages": [
            {"docid": "p2", "title": "", "text": "탑은 높다."},
            {"docid": "p3", "title": "탑", "text": "탑은 낡았다."},
        ],
    },
    {
        "query_id": "8",
        "query": "탑은요?",
        "answers": [],
        "positive_passages": [{"docid": "p2", "title": "", "text": "탑은 높다."}],
        "negative_passages": [],
    },
]


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "t.json", "t.parquet"])
def test_lists_of_tevatron(tmp_path, name):
    path, rows = tmp_path / name, datasets.Dataset.from_list(TEVATRON)
    if name == "t.json":
        path.write_text(json.dumps(TEVATRON))
    else:
        rows.to_parquet(path) if name == "t.parquet" else rows.to_json(path, force_ascii=False)
    assert texts(read(path)) == [
        ("다리는 언제 열렸나요?", ["다리 1932년에 열렸다."], ["탑은 높다.", "탑 탑은 낡았다."]),
        ("탑은요?", ["탑은 높다."], []),
    ]
    (first, _) = (line.record for file in data_files([str(path)]) for line in checked_lines(file))
    assert (first["query_id"], first["pos_ids"], first["neg_ids"]) == ("7", ["p1"], ["p2", "p3"])


def test_lists_of_dpr(tmp_path):
    """``answers`` are short ones, and no passages."""
    record = {
        "question": "q",
        "answers": ["a"],
        "positive_ctxs": [{"title": "T", "text": "p", "passage_id": 5}],
        "negative_ctxs": [{"title": "", "text": "easy"}],
        "hard_negative_ctxs": [{"title": "", "text": "hard", "passage_id": 6}, {"title": "", "text": "more"}],
    }
    (tmp_path / "t.json").write_text(json.dumps([record], indent=1))
    assert texts(read(tmp_path / "t.json")) == [("q", ["T p"], ["hard", "more"])]
    record["positive_ctxs"][0]["text"] = None
    (tmp_path / "t.json").write_text(json.dumps([record]))
    (fault,) = faults(tmp_path / "t.json")
    assert fault.endswith("t.json: row 1: field 'positive_ctxs': found an object, expected a string")


def test_hard_negatives_of_sentence_transformers(tiny_encoder, tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import mine_hard_negatives

    lines = make_triplets(12)
    pairs = datasets.Dataset.from_dict({"query": [x["query"] for x in lines], "answer": [x["pos"][0] for x in lines]})
    model = SentenceTransformer(str(tiny_encoder), device="cpu")
    mined = mine_hard_negatives(pairs, model, num_negatives=2, output_format="n-tuple", verbose=False)
    mined.to_parquet(tmp_path / "t.parquet")
    examples = read(tmp_path / "t.parquet")
    assert len(examples) == len(mined) > 0
    assert texts(examples)[0] == (
        mined[0]["query"],
        [mined[0]["answer"]],
        [mined[0]["negative_1"], mined[0]["negative_2"]],
    )


def test_columns_by_name(tmp_path):
    table = {"title": ["q"], "body": ["p"], "wrong": ["n"], "worse": ["m"], "query": ["not this"]}
    pandas.DataFrame(table).to_csv(tmp_path / "t.csv", index=False)
    wanted = [("q", ["p"], ["n", "m"])]
    assert texts(read(f"{tmp_path}/t.csv,query=title,pos=body,neg=wrong+worse")) == wanted
    pandas.DataFrame(table).to_json(tmp_path / "t.jsonl", orient="records", lines=True)
    assert texts(read(f"{tmp_path}/t.jsonl,query=title,pos=body,neg=wrong+worse")) == wanted
    with pytest.raises(UserError, match=r"t.csv: no column 'text', which is to be pos; it has title, body"):
        read(f"{tmp_path}/t.csv,query=title,pos=text")
    with pytest.raises(
        UserError, match=r"t.csv: found the columns title, body, wrong, worse, query; expected query and"
    ):
        read(tmp_path / "t.csv")


def test_a_data_set_of_the_hub(tmp_path, monkeypatch):
    """A stand-in: a folder as repositories of the hub are laid out."""
    repository = tmp_path / "set"
    repository.mkdir()
    as_parquet(repository / "train.parquet")
    (repository / "README.md").write_text(
        "---\nconfigs:\n- config_name: pair\n  data_files:\n  - split: train\n    path: train.parquet\n---\n"
    )
    entry = f"hub:{repository},config=pair,query=anchor"
    assert texts(read(entry)) == expected()
    first, again = (data_files([entry])[0].digest() for _ in range(2))
    assert first == again != data_files([f"hub:{repository},config=pair"])[0].digest()
    args = CLPLDataArguments(train_data=[entry], cache_path=str(tmp_path / "cache"), train_group_size=3)
    dataset = CLPLTrainDataset(args)
    assert dataset[(0, 0)].passages[0] == ROWS["positive"][0]
    with pytest.raises(UserError, match=rf"^hub:{re.escape(str(repository))},split=dev: the data set cannot be loaded"):
        read(f"hub:{repository},split=dev")
    with pytest.raises(UserError, match=r"^hub:nobody/nothing: the data set cannot be loaded"):
        read("hub:nobody/nothing")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("t.csv,spilt=train", "unknown setting 'spilt'; did you mean 'split'?"),
        ("t.csv,split=train", "found split=train, which is for hub:NAME"),
        ("t.csv,query=", "the setting 'query' has no value"),
        ("hub:", "found no name of a data set after hub:"),
        ("t.csv,header=no", "found header=no, expected true or false"),
        ("t.csv,queries=t.csv", "found no corpus=FILE, expected a table of texts for queries and for corpus"),
        ("t.csv,queries=t.csv,corpus=no.tsv", r"no.tsv: no such file .* \(corpus=\)"),
        ("t.csv,queries=t.csv,corpus=t.csv,query=a", "'query' has no effect where lines have ids"),
        ("owner/name", r"owner/name: no such file or folder, .*; a data set of the hub is hub:owner/name"),
        ("a,b.jsonl", "a,b.jsonl: no such file or folder"),
    ],
)
def test_settings_that_are_none(tmp_path, monkeypatch, entry, message):
    monkeypatch.chdir(tmp_path)
    as_csv("t.csv")
    with pytest.raises(UserError, match=message):
        data_files([entry])


def test_a_file_whose_name_has_commas(tmp_path):
    path = write_triplets(tmp_path / "a,split=train.jsonl", 3)
    assert len(read(path)) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "query,pos\na,b\nc\n", ["t.csv: row 2: found 1 cells, expected 2"]),
        (
            "t.csv",
            "anchor,positive\na,\n",
            ["t.csv: row 1: field 'positive': found an empty list, expected at least one"],
        ),
        ("t.csv", "anchor,positive\n,b\n", ["t.csv: row 1: field 'anchor': found an empty string"]),
        (
            "t.csv",
            "query,pos,neg\na,b,\"['x', 'y']\"\n",
            ["t.csv: row 1: field 'neg': found a list that was written as a text"],
        ),
        (
            "t.jsonl",
            '{"anchor": "a", "positive": "b", "negative": ["x", 3]}\n',
            ["t.jsonl:1: field 'negative': found a number, expected a string"],
        ),
        (
            "t.jsonl",
            '{"question": "a", "answer": "b", "label": 0}\n',
            ["t.jsonl:1: field 'label': says which rows are pairs"],
        ),
        ("t.csv", ",query,pos\n0,a,b\n1,c\n", ["t.csv: row 2: found 2 cells, expected 3"]),
        (
            "t.json",
            json.dumps({"anchor": {"0": "a"}, "positive": {"0": "b"}}),
            [
                "t.json:1: found a column as an object, expected one row a line; pandas",
                "t.json:1: field 'anchor': found an object",
                "t.json:1: field 'positive': found an object",
            ],
        ),
        ("t.json", '[{"query": "a", "pos": ["b"]}, 3]', ["t.json: row 2: found int, expected a JSON object"]),
    ],
)
def test_faults_name_row_and_column(tmp_path, monkeypatch, name, content, message):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(content, encoding="utf-8")
    found = faults(name)
    assert len(found) == len(message)
    assert all(fault.startswith(start) for fault, start in zip(found, message)), found


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"", "t.csv: the file is empty"),
        ("t.csv", b"query,pos\n", "t.csv: the file is empty, expected at least one row"),
        ("t.csv", b'query,pos\na,"b\n', "t.csv:2: broken table .*a quote that opens a cell has to be closed"),
        ("t.csv", b"query,pos,pos\na,b,c\n", "t.csv:1: the column 'pos' stands twice"),
        ("t.csv", "query,pos\na,b".encode("utf-16"), "t.csv: not UTF-8 text, but UTF-16"),
        (
            "t.tsv.gz",
            gzip.compress("query\tpos\na\tb".encode("utf-16"), mtime=0),
            "t.tsv.gz: not UTF-8 text, but UTF-16",
        ),
        ("t.jsonl", '{"query": "a", "pos": ["b"]}\n'.encode("utf-16"), "t.jsonl: not UTF-8 text, but UTF-16"),
        ("t.jsonl", '{"query": "a", "pos": ["b"]}\n'.encode("utf-32"), "t.jsonl: not UTF-8 text, but UTF-32"),
        ("t.json", codecs.BOM_UTF16_BE + "[]".encode("utf-16-be"), "t.json: not UTF-8 text, but UTF-16"),
        ("t.csv", "질문,답변\n가,나".encode("cp949"), "t.csv: not UTF-8 text .* iconv -f CP949 -t UTF-8"),
        ("t.csv", b"question,answer,label\na,b,0\n", "t.csv: field 'label': says which rows are pairs"),
        ("t.parquet", b"PAR1PAR1", "t.parquet: not parquet, or damaged"),
        ("t.arrow", b"x" * 100, "t.arrow: not arrow, or damaged"),
        ("t.arrow", b"", "t.arrow: not arrow, or damaged"),
        ("t.json", b'{"queries": {}, "corpus": {}, "relevant_docs": {}}', "t.json: the file is empty"),
        ("t.json", b"[]", "t.json: the file is empty"),
        ("t.tsv", b"1\t20\t30\n", "t.tsv:1: found numbers alone, .* t.tsv,queries=FILE,corpus=FILE"),
        ("t.tsv,header=false", b"1\t20\t30\n", "t.tsv:1: found numbers alone, .* t.tsv,queries=FILE,corpus=FILE"),
        ("t.xlsx", b"PK", "t.xlsx: a spreadsheet, expected a table as text"),
        ("t.json", b'[{"query": "\\ud800", "pos": ["b"]}]', "t.json: holds half of a surrogate pair"),
        ("t.json", b"version https://git-lfs.github.com/spec/v1\n", "t.json: found Git LFS's pointer"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path, monkeypatch, name, content, message):
    monkeypatch.chdir(tmp_path)
    Path(name.partition(",")[0]).write_bytes(content)
    with pytest.raises(UserError, match=f"^{message}"):
        faults(name)


def test_a_damaged_parquet_file(tmp_path):
    path = tmp_path / "t.parquet"
    pandas.DataFrame({"query": [str(i) for i in range(5000)], "pos": ["p" * 50] * 5000}).to_parquet(path)
    raw = bytearray(path.read_bytes())
    raw[100:900] = b"\x07" * 800
    path.write_bytes(raw)
    with pytest.raises(UserError, match=r"t\.parquet: not parquet, or damaged"):
        faults(path)


def test_the_digest_of_plain_lines_is_the_hash_of_the_file(tmp_path):
    """Checkpoints of before hold it."""
    from clpl_moe.common.files import hash_file

    path = write_triplets(tmp_path / "t.jsonl", 3)
    assert DataFile(str(path), str(path)).digest() == hash_file(path)
