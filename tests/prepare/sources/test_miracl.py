import errno
import gzip
import os
import subprocess
import sys
import threading
import tracemalloc
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from clpl_moe.common.files import read_jsonl
from clpl_moe.prepare.__main__ import main
from clpl_moe.prepare.files import read_source_lines
from clpl_moe.retrieval.collection import Collection
from helpers.miracl_files import passage, write_gz, write_miracl

CORPUS = "miracl-corpus-v1.0-ko"
TRAIN_TOPICS = "miracl-v1.0-ko/topics/topics.miracl-v1.0-ko-train.tsv"
TRAIN_QRELS = "miracl-v1.0-ko/qrels/qrels.miracl-v1.0-ko-train.tsv"
DEV_QRELS = "miracl-v1.0-ko/qrels/qrels.miracl-v1.0-ko-dev.tsv"


def lines(path):
    return [record for _, record in read_jsonl(path)]


def counts(printed):
    return {name.strip(): int(n) for name, _, n in (line.rpartition("  ") for line in printed.splitlines()[:-1])}


def prepare(source, output, **options):
    argv = ["--miracl", options.pop("miracl", "ko"), "--output", str(output)]
    if source is not None:
        argv += ["--source", str(source)]
    main(argv + [word for name, value in options.items() for word in (f"--{name}", *str(value).split())])


def refused(capsys, source, output, **options):
    """The message, with nothing written."""
    with pytest.raises(SystemExit) as stop:
        prepare(source, output, **options)
    assert stop.value.code == 2
    assert not output.exists() or not list(output.iterdir())
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message[message.index("error: ") :]


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_both_splits_of_a_folder_become_one_collection(tmp_path, capsys, flat):
    prepare(write_miracl(tmp_path / "source", flat=flat), tmp_path / "out")
    folder = tmp_path / "out" / "ko"
    assert sorted(path.name for path in folder.iterdir()) == [
        "corpus.jsonl",
        *("dev_qrels.jsonl", "dev_queries.jsonl"),
        *("train_qrels.jsonl", "train_queries.jsonl"),
    ]
    corpus = lines(folder / "corpus.jsonl")
    in_order = [number for part in range(3) for number in range(12)[part::3]]
    made = [passage(number) for number in in_order]
    assert corpus == [{"id": one["docid"], "title": one["title"], "text": one["text"]} for one in made]
    train = Collection.load(tmp_path / "out", "ko", "train")
    assert dict(zip(train.query_ids, train.queries)) == {"7#0": "첫째 질문?", "8": "둘째 질문?"}
    assert train.qrels == {"7#0": {"0#1": 1, "0#2": 0}, "8": {"3#2": 1}}
    assert Collection.load(tmp_path / "out", "ko", "dev").qrels == {"9": {"0#1": 0, "2#0": 1}}
    printed = capsys.readouterr()
    assert counts(printed.out) == {
        "passages": 12,
        **{"train queries": 2, "train judgements: relevant": 2, "train judgements: not relevant": 1},
        **{"dev queries": 1, "dev judgements: relevant": 1, "dev judgements: not relevant": 1},
    }
    assert "12 passages" in printed.err  # the bar
    assert "warning" not in printed.err


def test_parts_are_read_in_the_order_of_their_numbers(tmp_path):
    prepare(write_miracl(tmp_path / "source", parts=12), tmp_path / "out")
    assert [line["text"] for line in lines(tmp_path / "out/ko/corpus.jsonl")] == [f"본문 {n}" for n in range(12)]


def test_memory_does_not_hold_the_passages(tmp_path):
    prepare(write_miracl(tmp_path / "source"), tmp_path / "warm")  # imports count too
    source = tmp_path / "source"
    text = "본문 " * 3000  # 21 kB
    write_gz(source / CORPUS / "docs-2.jsonl.gz", (passage(n, text=text + str(n)) for n in range(12, 512)))
    tracemalloc.start()
    try:
        prepare(source, tmp_path / "out")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (tmp_path / "out/ko/corpus.jsonl").stat().st_size > 10_000_000
    assert peak < 2_000_000


def test_the_bar_moves_with_the_bytes_of_a_file(tmp_path):
    path = write_gz(tmp_path / "docs-0.jsonl.gz", ({"text": os.urandom(40).hex()} for _ in range(20_000)))
    moves = []
    assert sum(1 for _ in read_source_lines(path, SimpleNamespace(update=moves.append))) == 20_000
    assert sum(moves) == path.stat().st_size
    assert sum(move > 0 for move in moves) >= 3


def test_names_splits_and_titles(tmp_path):
    source = write_miracl(tmp_path / "source", "de")
    for path in source.rglob("*-train.tsv"):  # the hub has none
        path.unlink()
    prepare(source, tmp_path / "out", miracl="de", language="german", titles="false")
    folder = tmp_path / "out" / "german"
    assert not (folder / "train_queries.jsonl").exists()
    assert len(lines(folder / "dev_queries.jsonl")) == 1
    assert {line["title"] for line in lines(folder / "corpus.jsonl")} == {""}


def test_the_source_is_not_replaced_by_its_own_collection(tmp_path, capsys):
    source = write_miracl(tmp_path / "out" / "ko")
    (source / "corpus.jsonl").write_text("{}\n")  # so that it may be replaced
    with pytest.raises(SystemExit) as stop:
        prepare(source, tmp_path / "out", overwrite="true")
    assert stop.value.code == 2
    assert "the collection would replace" in capsys.readouterr().err
    assert (source / DEV_QRELS).is_file()


def test_what_a_reader_should_know_is_counted(tmp_path, capsys):
    source = write_miracl(tmp_path / "source", parts=2)
    write_gz(source / CORPUS / "docs-1.jsonl.gz", [passage(1, text=" "), passage(7, title=None)])
    with (source / TRAIN_TOPICS).open("a", encoding="utf-8") as file:
        file.write("10\t셋째  질문?\n")
    prepare(source, tmp_path / "out")
    printed = capsys.readouterr()
    expected = {
        "passages without text": 1,
        "relevant passages that the corpus lacks": 1,
        "train queries that equal a query of another split (kept)": 1,
        "train queries without judgement": 1,
    }
    assert expected.items() <= counts(printed.out).items()
    assert f"warning: {source / CORPUS}: 2 of the 3 files of MIRACL's passages in ko are here" in printed.err


def test_missing_files_are_named_with_where_they_go(tmp_path, capsys):
    source = write_miracl(tmp_path / "source", parts=4)
    (source / CORPUS / "docs-1.jsonl.gz").unlink()
    (source / CORPUS / "docs-2.jsonl.gz").rename(source / CORPUS / "docs-2.jsonl.gz.part")
    (source / TRAIN_QRELS).unlink()
    message = refused(capsys, source, tmp_path / "out")
    start = "qrels.miracl-v1.0-ko-train.tsv, docs-1.jsonl.gz, docs-2.jsonl.gz not found"
    assert message.startswith(f"error: {source}: {start}")
    for name in (f"{CORPUS}/docs-0.jsonl.gz", f"{CORPUS}/docs-2.jsonl.gz", TRAIN_TOPICS, TRAIN_QRELS, DEV_QRELS):
        assert f"{source}/{name} " in message
    assert "https://huggingface.co/datasets/miracl/miracl-corpus" in message
    nowhere = refused(capsys, tmp_path / "nowhere", tmp_path / "out")
    assert "no such folder" in nowhere
    assert TRAIN_QRELS in nowhere
    (tmp_path / "empty").mkdir()
    assert "docs-0.jsonl.gz not found" in refused(capsys, tmp_path / "empty", tmp_path / "out")


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def damage(path):
    content = bytearray(path.read_bytes())
    content[-6] ^= 1  # of the check sum
    path.write_bytes(bytes(content))


def append(text):
    def change(path):
        with path.open("a", encoding="utf-8") as file:
            file.write(text)

    return change


def rewrite(*records):
    return lambda path: write_gz(path, records)


PART = f"{CORPUS}/docs-1.jsonl.gz"
FAULTS = {
    "cut": (PART, cut, "docs-1.jsonl.gz:", "the file ends too early"),
    "damaged": (PART, damage, "docs-1.jsonl.gz:5: broken gzip (CRC check failed", "fetch this file again"),
    "not gzip": (PART, lambda path: path.write_text("<html>"), "docs-1.jsonl.gz:1: broken gzip (Not a gzipped file"),
    "empty": (PART, lambda path: path.write_bytes(b""), "docs-1.jsonl.gz: the file is empty"),
    "empty inside": (PART, rewrite(), "docs-1.jsonl.gz: the file is empty"),
    "git lfs": (PART, lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "`git lfs pull`"),
    "not JSON": (PART, lambda path: path.write_bytes(gzip.compress(b'{"docid": 1\n')), "docs-1.jsonl.gz:1: not JSON"),
    "no id": (PART, rewrite(passage(1), {"id": "1", "text": "x"}), ":2: field 'docid': found only id, text"),
    "id type": (
        PART,
        rewrite(passage(1, docid=[7])),
        ":1: field 'docid': found [7], expected a string or a whole number",
    ),
    "id space": (PART, rewrite(passage(1, docid="7 #1")), "found '7 #1', expected an id without white space"),
    "no text": (PART, rewrite(passage(1, text=None)), ":1: field 'text': found None, expected a string"),
    "title": (PART, rewrite(passage(1, title=["x"])), ":1: field 'title': found ['x'], expected a string"),
    "repeated id": (
        PART,
        rewrite(passage(1), passage(6)),
        "docs-1.jsonl.gz:2: field 'docid': '2#0' stands at ",
        "docs-0.jsonl.gz:3 already",
    ),
    "topic": (TRAIN_TOPICS, append("11 no tab\n"), "train.tsv:3: found '11 no tab', expected a query's id, a tab"),
    "topic text": (TRAIN_TOPICS, append("11\t \n"), "train.tsv:3: found '11\\t '"),
    "topic id": (TRAIN_TOPICS, append("1 1\ttext\n"), "train.tsv:3: field 'query id': found '1 1'"),
    "repeated topic": (
        TRAIN_TOPICS,
        append("8\ttext\n"),
        "train.tsv:3: field 'query id': '8' stands on line 2 already",
    ),
    "topic bytes": (TRAIN_TOPICS, lambda path: path.write_bytes(b"1\tx\n2\t\xff\n"), "train.tsv:2: not UTF-8"),
    "empty topics": (TRAIN_TOPICS, lambda path: path.write_text("\n"), "train.tsv: the file is empty"),
    "unknown topic": (DEV_QRELS, append("8\tQ0\t0#1\t1\n"), "dev.tsv:3: field 'query id': '8' is not an id of "),
    "grade": (DEV_QRELS, append("9\tQ0\t0#0\tyes\n"), "dev.tsv:3: field 'relevance': found 'yes', expected an integer"),
    "line of names": (
        DEV_QRELS,
        lambda path: path.write_text("query Q0 passage relevance\n9 Q0 2#0 1\n"),
        "dev.tsv:1: field 'relevance': found 'relevance', expected an integer",
    ),
    "fields": (DEV_QRELS, append("9\t0#0\t1\n"), "dev.tsv:3: found 3 fields, expected 4: query id, Q0, passage id"),
    "judged twice": (DEV_QRELS, append("9\tQ0\t2#0\t0\n"), "dev.tsv:3: field 'relevance': found 0, but an earlier"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_name_the_place_and_write_nothing(tmp_path, capsys, name):
    file, change, *words = FAULTS[name]
    source = write_miracl(tmp_path / "source")
    change(source / file)
    message = refused(capsys, source, tmp_path / "out")
    assert str(source) in message
    assert message.count("\n") == 1
    for word in words:
        assert word in message


def test_ids_of_one_hash_are_no_fault(tmp_path, monkeypatch):
    monkeypatch.setattr("clpl_moe.prepare.source.hash", len, raising=False)
    prepare(write_miracl(tmp_path / "source"), tmp_path / "out")
    assert len(lines(tmp_path / "out/ko/corpus.jsonl")) == 12


def test_a_judgement_that_stands_twice_is_one(tmp_path):
    source = write_miracl(tmp_path / "source")
    append("9\tQ0\t2#0\t1\n")(source / DEV_QRELS)
    prepare(source, tmp_path / "out")
    assert len(lines(tmp_path / "out/ko/dev_qrels.jsonl")) == 2


def test_existing_collection_stays_unless_asked_and_when_the_source_is_broken(tmp_path, capsys):
    source = write_miracl(tmp_path / "source")
    prepare(source, tmp_path / "out")
    corpus = tmp_path / "out/ko/corpus.jsonl"
    before = corpus.read_bytes()
    write_gz(source / CORPUS / "docs-3.jsonl.gz", [passage(12)])
    with pytest.raises(SystemExit):
        prepare(source, tmp_path / "out")
    assert "set overwrite" in capsys.readouterr().err
    content = (source / CORPUS / "docs-3.jsonl.gz").read_bytes()
    cut(source / CORPUS / "docs-3.jsonl.gz")
    with pytest.raises(SystemExit):
        prepare(source, tmp_path / "out", overwrite="true")
    assert corpus.read_bytes() == before
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["ko"]
    (source / CORPUS / "docs-3.jsonl.gz").write_bytes(content)
    prepare(source, tmp_path / "out", overwrite="true")
    assert len(lines(corpus)) == 13


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"miracl": "xx"}, "--miracl: found 'xx', expected one of ar, bn, de,"),
        ({"splits": "train test"}, "--splits: found 'test', expected train or dev"),
        ({"miracl": "yo", "splits": "train dev"}, "--splits: MIRACL has no train queries in yo, expected dev alone"),
        ({"dev_share": 0.5}, "--dev_share: goes with squad, not with miracl"),
        ({"seed": 1}, "--seed: goes with squad, not with miracl"),
        ({"beir": "x"}, "found beir and miracl, set one of beir, hub, ir_dataset, miracl or squad"),
        ({"language": "a/b"}, "expected the name of a folder"),
    ],
)
def test_options(tmp_path, capsys, options, words):
    assert words in refused(capsys, tmp_path, tmp_path / "out", **options)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as its client needs: a file's head and content, a repository's commit and list of files."""

    commit = "0123456789abcdef0123456789abcdef01234567"
    folder, need_token, asked = None, True, []

    def answer(self, status, content=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_GET(self):
        self.asked.append((self.command, self.path))
        token = self.headers.get("Authorization")
        head, _, rest = self.path.removeprefix("/api").removeprefix("/datasets/miracl/").partition("/")
        if head == "miracl" and self.need_token and token != "Bearer hf_right":
            wrong = {"X_Error_Code": "GatedRepo"} if token is None else {}
            self.answer(401, X_Error_Message="no", **wrong)
        elif rest.startswith("revision/"):
            self.answer(200, f'{{"id": "miracl/{head}", "sha": "{self.commit}", "siblings": []}}'.encode())
        elif rest.startswith("tree/"):
            files = [path for path in sorted(self.folder.rglob("*")) if path.is_file()]
            entries = [
                f'{{"type": "file", "path": "{path.relative_to(self.folder).as_posix()}", "size": '
                f'{path.stat().st_size}, "oid": "x"}}'
                for path in files
            ]
            self.answer(200, f"[{', '.join(entries)}]".encode(), Content_Type="application/json")
        else:
            path = self.folder / rest.split("/", 2)[2]
            if path.is_file():
                content = path.read_bytes()
                self.answer(200, content, ETag=f'"{path.name}"', X_Repo_Commit=self.commit)
            else:
                self.answer(404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    class OneHub(Hub):
        folder, asked = write_miracl(tmp_path / "hub"), []

    server = ThreadingHTTPServer(("127.0.0.1", 0), OneHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    OneHub.address = f"http://127.0.0.1:{server.server_port}"
    yield OneHub
    server.shutdown()
    server.server_close()


def from_hub(tmp_path, address, token=None):
    names = ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_HUB_CACHE")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": address, "HF_HUB_ETAG_TIMEOUT": "60"}
    environment |= {"HF_TOKEN": token} if token else {}
    argv = ["--miracl", "ko", "--output", str(tmp_path / "out"), "--overwrite", "true"]
    return subprocess.run(
        [sys.executable, "-m", "clpl_moe.prepare", *argv], env=environment, capture_output=True, text=True, timeout=900
    )


@pytest.mark.slow  # four fresh interpreters
def test_from_the_hub(tmp_path, hub):
    for token in (None, "hf_wrong"):
        done = from_hub(tmp_path, hub.address, token)
        assert done.returncode == 2, done.stderr
        assert "Accept its terms on https://huggingface.co/datasets/miracl/miracl (logged in)" in done.stderr
        assert "`hf auth login`" in done.stderr
        assert f"DIR/{DEV_QRELS} " in done.stderr
        assert "Traceback" not in done.stderr
        assert "hf_wrong" not in done.stderr
        assert not (tmp_path / "out").exists()
    assert not any(CORPUS in path for _, path in hub.asked)  # nothing large before the terms are accepted
    done = from_hub(tmp_path, hub.address, "hf_right")
    assert done.returncode == 0, done.stderr
    assert Collection.load(tmp_path / "out", "ko", "train").qrels["7#0"] == {"0#1": 1, "0#2": 0}
    assert len(lines(tmp_path / "out/ko/corpus.jsonl")) == 12
    hub.asked.clear()
    assert from_hub(tmp_path, hub.address, "hf_right").returncode == 0
    assert not [path for command, path in hub.asked if command == "GET" and "/resolve/" in path]  # from the cache


@pytest.mark.slow
def test_a_file_that_the_hub_lacks(tmp_path, hub):
    hub.need_token = False
    hub.folder.joinpath(TRAIN_QRELS).unlink()
    done = from_hub(tmp_path, hub.address)
    assert done.returncode == 2
    assert "the hub answered with an error (404)" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_network(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    message = refused(capsys, None, tmp_path / "out")
    assert "the hub could not be reached" in message
    assert "set source to their folder DIR" in message
    for name in (f"{CORPUS}/docs-0.jsonl.gz", f"{CORPUS}/docs-2.jsonl.gz", TRAIN_TOPICS, TRAIN_QRELS, DEV_QRELS):
        assert f"DIR/{name} " in message


def test_a_full_disk_while_downloading_is_told_as_such(tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "blob")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", full)
    assert refused(capsys, None, tmp_path / "out") == "error: blob: No space left on device\n"


def test_without_titles_the_collection_and_its_results_say_so(tmp_path):
    write_miracl(tmp_path / "source")
    argv = ["--miracl", "ko", "--source", str(tmp_path / "source"), "--output", str(tmp_path / "out")]
    main(argv)
    main([*argv, "--titles", "false"])
    main([*argv, "--titles", "false", "--language", "named"])
    found = {path.name: Collection.load(tmp_path / "out", path.name, "dev") for path in (tmp_path / "out").iterdir()}
    assert {name: (c.language, c.titled) for name, c in found.items()} == {
        "ko": ("ko", 12),
        "ko-no-titles": ("ko-no-titles", 0),
        "named": ("named", 0),
    }
    assert found["ko"].passages[0] == f"{passage(0)['title']} {found['named'].passages[0]}"
