import json

import pytest

from clpl_moe.common.errors import UserError
from clpl_moe.common.files import read_jsonl
from clpl_moe.prepare.__main__ import main
from clpl_moe.prepare.sources.squad import read_squad
from clpl_moe.retrieval.collection import Collection
from helpers.squad_files import many, squad


def lines(path):
    return [record for _, record in read_jsonl(path)]


def prepare(*files, output, **options):
    argv = ["--squad", *map(str, files), "--language", "ko", "--output", str(output)]
    main(argv + [word for key, value in options.items() for word in (f"--{key}", str(value))])


def test_command_writes_a_collection_split_by_article(tmp_path, capsys):
    prepare(squad(tmp_path / "a.json", *many(10)), output=tmp_path / "out")
    folder = tmp_path / "out" / "ko"
    corpus = {line["id"]: line for line in lines(folder / "corpus.jsonl")}
    assert len(corpus) == 20
    split = corpus["3#1"].pop("split")
    assert corpus["3#1"] == {"id": "3#1", "title": "제목 3", "text": "둘째 3."}
    corpus["3#1"]["split"] = split
    sides = {}
    for split, articles in (("train", 8), ("dev", 2)):
        collection = Collection.load(tmp_path / "out", "ko", split)
        assert len(collection.queries) == 3 * articles
        passages = {passage_id for judged in collection.qrels.values() for passage_id in judged}
        sides[split] = {passage_id.split("#")[0] for passage_id in passages}
        assert len(sides[split]) == articles
        texts = dict(zip(collection.query_ids, collection.queries))
        for query_id, judged in collection.qrels.items():
            (passage_id,) = judged
            assert texts[query_id].rstrip("?").split()[-1] == passage_id.split("#")[0]
    assert not sides["train"] & sides["dev"]
    assert all(line["id"].split("#")[0] in sides[line["split"]] for line in corpus.values())
    positive = {line["docid"]: line["queries"] for line in lines(folder / "positive_queries.jsonl")}
    train = lines(folder / "train_queries.jsonl")
    assert sorted(q for queries in positive.values() for q in queries) == sorted(q["text"] for q in train)
    assert {passage_id.split("#")[0] for passage_id in positive} == sides["train"]
    number = min(sides["train"])
    assert positive[f"{number}#0"] == [f"질문 {number}?", f"또 {number}?"]
    printed = capsys.readouterr().out
    assert "dev articles" in printed
    assert str(folder) in printed


@pytest.mark.parametrize(("share", "there", "absent"), [(0, "train", "dev"), (1, "dev", "train")])
def test_one_side_only(tmp_path, share, there, absent):
    prepare(squad(tmp_path / "a.json", *many(1)), output=tmp_path / "out", dev_share=share)
    names = {path.name for path in (tmp_path / "out" / "ko").iterdir()}
    assert {f"{there}_queries.jsonl", f"{there}_qrels.jsonl"} < names
    assert not any(name.startswith(absent) for name in names)
    assert ("positive_queries.jsonl" in names) == (there == "train")


def test_several_files_and_no_titles(tmp_path):
    made = many(4)
    files = squad(tmp_path / "a.json", *made[:2]), squad(tmp_path / "b.json", *made[1:])
    prepare(*files, output=tmp_path / "out", titles="false")
    corpus = lines(tmp_path / "out" / "ko" / "corpus.jsonl")
    assert [line["text"] for line in corpus] == [f"{p} {i}." for i in range(4) for p in ("본문", "둘째")]
    assert all(line["title"] == "" for line in corpus)
    queries = [q for split in ("train", "dev") for q in lines(tmp_path / "out" / "ko" / f"{split}_queries.jsonl")]
    assert len(queries) == 12


def broken(change):
    content = {"data": many(3)}
    change(content)
    return json.dumps(content)


FAULTS = {
    "no data": (lambda c: c.pop("data"), "field 'data': found nothing, expected a list"),
    "no articles": (lambda c: c.update(data=[]), "field 'data': holds no article"),
    "article": (lambda c: c["data"].insert(1, "x"), "field 'data[1]': found str, expected an object"),
    "title": (lambda c: c["data"][2].update(title=5), "field 'data[2].title': found int"),
    "paragraphs": (lambda c: c["data"][0].pop("paragraphs"), "field 'data[0].paragraphs': found nothing"),
    "context": (
        lambda c: c["data"][0]["paragraphs"][1].update(context=None),
        "field 'data[0].paragraphs[1].context': found null, expected a string",
    ),
    "qas": (
        lambda c: c["data"][0]["paragraphs"][1].update(qas={}),
        "paragraphs[1].qas': found dict, expected a",
    ),
    "question": (
        lambda c: c["data"][2]["paragraphs"][0]["qas"][1].update(question=["x"]),
        "field 'data[2].paragraphs[0].qas[1].question': found list, expected a string",
    ),
    "id": (lambda c: c["data"][0]["paragraphs"][0]["qas"][0].pop("id"), "qas[0].id': found nothing"),
    "id type": (lambda c: c["data"][0]["paragraphs"][0]["qas"][0].update(id=True), "qas[0].id': found bool"),
    "id space": (
        lambda c: c["data"][0]["paragraphs"][0]["qas"][0].update(id="a b"),
        "qas[0].id': found 'a b'",
    ),
    "impossible": (
        lambda c: c["data"][0]["paragraphs"][0]["qas"][0].update(is_impossible="no"),
        "qas[0].is_impossible': found str, expected true or false",
    ),
    "answers": (
        lambda c: c["data"][0]["paragraphs"][0]["qas"][0].update(answers={}),
        "qas[0].answers': found dict, expected a list",
    ),
    "same id": (
        lambda c: [c["data"][n]["paragraphs"][0]["qas"][0].update(id="same") for n in (0, 1)],
        "field 'data[1].paragraphs[0].qas[0]': the id 'same' belongs to another question",
    ),
    "all impossible": (
        lambda c: [q.update(answers=[]) for a in c["data"] for p in a["paragraphs"] for q in p["qas"]],
        "no question is left",
    ),
    "one article": (lambda c: c.update(data=c["data"][:1]), "set dev_share to 0 for train only or to 1 for dev only"),
}
CONTENTS = {name: (broken(change), words) for name, (change, words) in FAULTS.items()} | {
    "not JSON": ('{"data": [\n1,]}', "a.json:2: not JSON"),
    "a list": ("[]", "found list, expected an object"),
    "empty": ("", "not JSON"),
    "surrogate": ('{"data": [{"title": "\\ud800"}]}', "half of a surrogate pair"),
    "deep": ("[" * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_faults_name_the_place_and_write_nothing(tmp_path, capsys, name):
    content, words = CONTENTS[name]
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit) as exit:
        prepare(tmp_path / "a.json", output=tmp_path / "out")
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1
    assert not list((tmp_path / "out").rglob("*"))


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_squad(tmp_path / "a.json")
    with pytest.raises(UserError, match="found a folder, expected a file"):
        read_squad(tmp_path)
    (tmp_path / "a.json").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="Git LFS's pointer"):
        read_squad(tmp_path / "a.json")
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        read_squad(tmp_path / "a.json")


def test_existing_collection_is_not_overwritten_unasked(tmp_path, capsys):
    file = squad(tmp_path / "a.json", *many(5))
    prepare(file, output=tmp_path / "out")
    before = (tmp_path / "out" / "ko" / "dev_queries.jsonl").read_text()
    with pytest.raises(SystemExit) as exit:
        prepare(file, output=tmp_path / "out", dev_share=0.6)
    assert exit.value.code == 2
    assert "set overwrite" in capsys.readouterr().err
    assert (tmp_path / "out" / "ko" / "dev_queries.jsonl").read_text() == before
    prepare(file, output=tmp_path / "out", dev_share=0.6, overwrite="true")
    assert (tmp_path / "out" / "ko" / "dev_queries.jsonl").read_text() != before


@pytest.mark.parametrize("name", ["a.json", "raw/a.json"])
def test_a_source_in_the_folder_to_replace_is_not_lost(tmp_path, capsys, name):
    prepare(squad(tmp_path / "first.json", *many(5)), output=tmp_path / "out")
    file = tmp_path / "out" / "ko" / name
    file.parent.mkdir(exist_ok=True)
    squad(file, *many(6))
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stop:
        prepare(tmp_path / "first.json", file, output=tmp_path / "out", overwrite="true")
    assert stop.value.code == 2
    assert f"{file}: the collection would replace {tmp_path / 'out' / 'ko'}" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_share_out_of_range(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        prepare(squad(tmp_path / "a.json", *many(5)), output=tmp_path / "out", dev_share=1.5)
    assert exit.value.code == 2
    assert "--dev_share: found 1.5" in capsys.readouterr().err


@pytest.mark.parametrize("language", ["", "..", "a/b"])
def test_language_names_a_folder(tmp_path, capsys, language):
    """Otherwise --overwrite would replace a folder that is no collection."""
    with pytest.raises(SystemExit) as stop:
        main(["--squad", "x.json", "--output", str(tmp_path), "--overwrite", "true", f"--language={language}"])
    assert stop.value.code == 2
    assert "expected the name of a folder" in capsys.readouterr().err
