import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from clpl_moe.common.errors import UserError
from clpl_moe.common.files import read_jsonl
from clpl_moe.prepare import make_collection, read_squad
from clpl_moe.prepare.__main__ import main
from clpl_moe.retrieval.collection import Collection


def article(title, *paragraphs):
    """An article; each paragraph is a context and its questions: texts, or fields to replace."""
    made = []
    for context, *questions in paragraphs:
        qas = []
        for number, question in enumerate(questions):
            fields = {"question": question} if isinstance(question, str) else question
            answers = [{"text": context[:3], "answer_start": 0}]
            qas.append({"id": f"{title}-{context[:8]}-{number}".replace(" ", "_"), "answers": answers, **fields})
        made.append({"context": context, "qas": qas})
    return {"title": title, "paragraphs": made}


def squad(path, *articles):
    path.write_text(json.dumps({"version": "1.1", "data": list(articles)}, ensure_ascii=False), encoding="utf-8")
    return path


def many(count):
    return [
        article(f"제목_{i}", (f"본문 {i}.", f"질문 {i}?", f"또 {i}?"), (f"둘째 {i}.", f"셋째 질문 {i}?"))
        for i in range(count)
    ]


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


def test_split_depends_on_seed_and_content_not_on_order(tmp_path):
    articles = read_squad(squad(tmp_path / "a.json", *many(30)))

    def dev(articles, seed):
        return {line["text"] for line in make_collection(articles, 0.2, seed).queries["dev"]}

    assert dev(articles, 1) == dev(articles[::-1], 1)
    assert dev(articles, 1) != dev(articles, 2)
    assert len(dev(articles, 1)) == len(dev(articles, 2)) == 18


@pytest.mark.parametrize(("share", "dev"), [(0.2, 2), (0.01, 1), (0.99, 9), (0.5, 5)])
def test_share(tmp_path, share, dev):
    articles = read_squad(squad(tmp_path / "a.json", *many(10)))
    assert make_collection(articles, share).counts["dev articles"] == dev


@pytest.mark.parametrize(("share", "there", "absent"), [(0, "train", "dev"), (1, "dev", "train")])
def test_one_side_only(tmp_path, share, there, absent):
    prepare(squad(tmp_path / "a.json", *many(1)), output=tmp_path / "out", dev_share=share)
    names = {path.name for path in (tmp_path / "out" / "ko").iterdir()}
    assert {f"{there}_queries.jsonl", f"{there}_qrels.jsonl"} < names
    assert not any(name.startswith(absent) for name in names)
    assert ("positive_queries.jsonl" in names) == (there == "train")


def test_skips_and_merges(tmp_path):
    file = squad(
        tmp_path / "a.json",
        article(
            "one",
            ("Same  text\u0065\u0301 here", "q1", " q1 ", {"question": "no", "is_impossible": True}),
            ("Same text\u00e9\nhere", "q2", {"question": "none", "answers": []}),
            ("  ", "lost"),
            ("without questions",),
            ("another", "q1", {"question": "  "}),
        ),
    )
    prepared = make_collection(read_squad(file), dev_share=0)
    assert [line["id"] for line in prepared.corpus] == ["0#0", "0#3", "0#4"]
    assert [line["text"] for line in prepared.queries["train"]] == ["q1", "q2"]
    first = prepared.queries["train"][0]["id"]
    assert [line["docid"] for line in prepared.qrels["train"] if line["qid"] == first] == ["0#0", "0#4"]
    assert prepared.positive_queries == [
        {"docid": "0#0", "queries": ["q1", "q2"]},
        {"docid": "0#4", "queries": ["q1"]},
    ]
    expected = {
        "paragraphs": 5,
        "questions": 8,
        "passages": 3,
        "equal contexts merged": 1,
        "empty contexts skipped": 1,
        "questions on empty contexts skipped": 1,
        "impossible questions skipped": 2,
        "empty questions skipped": 1,
        "equal questions merged": 2,
    }
    assert {name: prepared.counts[name] for name in expected} == expected


def test_articles_that_share_a_context_or_a_title_stay_on_one_side(tmp_path):
    shared = ("공통 본문", "공통 질문?")
    made = many(8)
    for number in (0, 3, 6):
        made[number]["paragraphs"] += article(f"x{number}", shared)["paragraphs"]
    made[5]["title"] = made[1]["title"]
    articles = read_squad(squad(tmp_path / "a.json", *made))
    for seed in range(20):
        prepared = make_collection(articles, 0.4, seed)
        sides = {split: {line["docid"].split("#")[0] for line in lines} for split, lines in prepared.qrels.items()}
        assert not sides["train"] & sides["dev"]
        for together in ({"0", "3", "6"}, {"1", "5"}):
            assert together <= sides["train"] or together <= sides["dev"]
        assert prepared.counts["dev articles"] == 3


def test_train_question_that_equals_a_dev_question_is_left_out(tmp_path):
    made = many(10)
    for number, one in enumerate(made):
        one["paragraphs"][0]["qas"].append({"id": f"same{number}", "question": "언제  태어났나?", "answers": [1]})
    prepared = make_collection(read_squad(squad(tmp_path / "a.json", *made)))
    assert prepared.counts["train questions that equal a dev question left out"] == 8
    texts = {split: {line["text"] for line in lines} for split, lines in prepared.queries.items()}
    assert "언제  태어났나?" in texts["dev"]
    assert not texts["dev"] & texts["train"]
    assert not texts["dev"] & {q for line in prepared.positive_queries for q in line["queries"]}


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
    "one article": (lambda c: c.update(data=c["data"][:1]), "--dev_share 0 for train only or 1 for dev only"),
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


def test_the_experiment_belongs_to_one_file_and_leaves_its_results_beside_it(tmp_path):
    """``scripts/squad_experiment.sh`` in a repository and with a ``python`` that are stand-ins."""
    root, bin, here = tmp_path / "repository", tmp_path / "venv" / "bin", tmp_path / "here"
    bin.mkdir(parents=True)
    here.mkdir()
    shutil.copytree(Path(__file__).parents[2] / "scripts", root / "scripts")
    (bin / "python").write_text(f'#!/bin/sh\necho "$@" >> "{tmp_path}/calls"\n')
    (bin / "python").chmod(0o755)
    (bin / "activate").write_text(f'PATH="{bin}:$PATH"\n')
    (bin.parent / ".installed").touch()
    for name in ("a", "b"):
        (here / f"{name}.json").write_text(name)

    def run(file, **variables):
        """Exit code, stderr, and what was called."""
        (tmp_path / "calls").write_text("")
        environment = os.environ | {"VENV": str(bin.parent), **variables}
        script = ["bash", str(root / "scripts" / "squad_experiment.sh"), "ko", file, "--seed", "1"]
        done = subprocess.run(script, cwd=here, env=environment, capture_output=True, text=True)
        return done.returncode, done.stderr, (tmp_path / "calls").read_text().splitlines()

    code, err, calls = run("a.json")
    assert code == 0, err
    assert [call.split()[1] for call in calls[:-1]] == [
        f"clpl_moe.{name}" for name in ("small_encoder", "prepare", "mine", "train", "evaluate")
    ]
    assert f"--squad {here}/a.json " in calls[1]
    assert calls[3].endswith(" --seed 1")
    assert calls[-1].split()[-1] == "runs/squad_ko/results.json"
    (here / "a.json").rename(here / "renamed.json")
    code, err, calls = run("renamed.json", OUTPUT="mine.json")
    assert (code, calls[-1].split()[-1]) == (0, f"{here}/mine.json"), err
    for file, words in (("b.json", "move or remove the folder"), ("none.json", "none.json: no such file")):
        code, err, calls = run(file)
        assert (code, err.count("\n"), calls) == (2, 1, [])
        assert err.startswith("error: ")
        assert words in err
    # What an earlier version left: nobody knows of which file.
    (root / "runs" / "squad_ko" / "source.sha256").rename(root / "runs" / "squad_ko" / "train.jsonl")
    assert run("renamed.json")[0] == 2
