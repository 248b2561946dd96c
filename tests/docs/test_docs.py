"""README and docs say what is so: links, public names, options, and code that runs."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

import clpl_moe.__main__
from helpers import documents
from helpers.documents import PAGES, REPOSITORY, ROOT, SITE

VERBS = {*clpl_moe.__main__.VERBS, "quickstart"}
pages = pytest.mark.parametrize("page", PAGES, ids=documents.name)


@pytest.mark.parametrize(("file", "most"), [("README.md", 1600), ("ARCHITECTURE.md", 1500)])
def test_words(file, most):
    assert len((ROOT / file).read_text(encoding="utf-8").split()) <= most


@pages
def test_links_lead_somewhere(page):
    for link in documents.links(page):
        target, _, anchor = link.partition("#")
        for address in (f"{REPOSITORY}/blob/main/", f"{REPOSITORY}/tree/main/"):
            if target.startswith(address):
                file = ROOT / target.removeprefix(address)
                break
        else:
            if "://" in target:
                continue
            file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{documents.name(page)}: {link}"
        if anchor:
            assert anchor in documents.anchors(file), f"{documents.name(page)}: {link}"


@pages
def test_named_files_exist(page):
    text = page.read_text(encoding="utf-8")
    folders = "configs|benchmarks|scripts|examples|tests|imgs|docs|src|data/samples"
    for path in re.findall(rf"(?<![\w/.])(?:{folders})/[\w./*-]*[\w*]", text):
        if path != "examples/s":  # the unit
            assert list(ROOT.glob(path)), f"{documents.name(page)}: {path}"


def test_modules_that_the_architecture_names_exist():
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    paths = re.findall(r"`([a-z_]+/(?:[a-z_]+\.py)?)`", text)
    assert len(paths) > 20
    for path in set(paths):
        assert (ROOT / "src/clpl_moe" / path).exists(), path


def test_documents_that_other_files_name_exist():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not files:
        pytest.skip("no clone")
    for file in files:
        if file.endswith((".py", ".yaml", ".sh", ".toml", ".txt")) and (ROOT / file).is_file():
            for path in re.findall(r"(?<![\w/])(?:docs|data)/[\w/-]+\.md", (ROOT / file).read_text(encoding="utf-8")):
                assert (ROOT / path).is_file(), f"{file}: {path}"


def test_every_public_name_has_its_place_in_the_api():
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs/api").glob("*.md"))
    documented = set(re.findall(r"^::: clpl_moe\.(\w+)$", text, re.MULTILINE))
    assert set(clpl_moe.__all__) - documented == {"__version__"}
    index = (ROOT / "docs/api/index.md").read_text(encoding="utf-8")
    assert set(clpl_moe.__all__) <= set(re.findall(r"`(\w+)`", index))


def test_every_name_that_a_room_exports_is_documented():
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs/api").glob("*.md"))
    entries = re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)
    assert len(entries) == len(set(entries))
    documented = {entry.rpartition(".")[2] for entry in entries}
    for members in re.findall(r"members: \[(.+)\]", text):
        documented |= set(members.split(", "))
    for room in sorted((ROOT / "src/clpl_moe").glob("*/__init__.py")):
        names = getattr(importlib.import_module(f"clpl_moe.{room.parent.name}"), "__all__", [])
        # The options of a verb stand on its page.
        missing = {name for name in names if not name.endswith("Arguments")} - documented
        assert not missing, room


def test_documented_modules_and_names_exist():
    for path in (ROOT / "docs/api").glob("*.md"):
        for name in re.findall(r"^::: ([\w.]+)$", path.read_text(encoding="utf-8"), re.MULTILINE):
            module, _, attribute = name.rpartition(".")
            owner = importlib.import_module(module)
            assert hasattr(owner, attribute) or importlib.util.find_spec(name), f"{path.name}: {name}"


def test_every_page_is_in_the_navigation():
    class Loader(yaml.SafeLoader):
        """Leaves tags of Python alone."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    navigation = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)["nav"]
    named = set(re.findall(r"[\w/-]+\.md", json.dumps(navigation)))
    assert named == {path.relative_to(ROOT / "docs").as_posix() for path in SITE[1:]}
    for verb in VERBS - {"card"}:
        assert f"verbs/{verb}.md" in named


@pytest.fixture(scope="module")
def known_options():
    """The options that ``--help`` of a command lists."""
    known: dict[str, set[str]] = {}

    def options(verb: str) -> set[str]:
        if verb not in known:
            room = f"clpl_moe.{verb}"
            is_package = importlib.util.find_spec(room).submodule_search_locations is not None
            module = importlib.import_module(f"{room}.__main__" if is_package else room)
            text = io.StringIO()
            with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
                module.main(["--help"])
            lines = re.findall(r"^ +--.*", text.getvalue(), re.MULTILINE)
            known[verb] = {"help", *(name for line in lines for name in re.findall(r"(?:^ +|, )--(\w+)", line))}
        return known[verb]

    return options


@pages
def test_commands_name_options_that_exist(page, known_options):
    for line, verb, words in documents.commands(page):
        place = f"{documents.name(page)}:{line}: {verb}"
        assert verb in VERBS, place
        for word in words:
            if word.startswith("--"):
                assert word[2:].partition("=")[0] in known_options(verb), f"{place} {word}"


@pytest.mark.parametrize("verb", sorted(VERBS - {"card", "quickstart"}))
def test_tables_list_options_that_exist(verb, known_options):
    known = known_options(verb) | (known_options("card") if verb == "report" else set())
    listed = set(documents.table_options(ROOT / f"docs/verbs/{verb}.md"))
    assert listed <= known
    assert listed or verb == "train"


def test_configuration_lists_options_of_training_that_exist(known_options):
    listed = set(documents.table_options(ROOT / "docs/configuration.md"))
    assert listed <= known_options("train")
    assert len(listed) >= 50


# ---- Python blocks run, page by page, with tiny stand-ins for the models.

WITH_BLOCKS = [page for page in SITE if documents.blocks(page, "python")]


def test_few_blocks_are_not_run():
    left_out = [block for page in WITH_BLOCKS for block in documents.blocks(page, "python") if block.not_run]
    assert len(left_out) <= 2


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_tokenizer):
    """A folder with what the pages take for granted: models, data, a run."""
    import torch

    from clpl_moe import load_encoder, save_encoder
    from clpl_moe.common.files import write_jsonl
    from clpl_moe.encoder.settings import EmbeddingSettings
    from clpl_moe.train import train
    from helpers.tiny import make_encoder

    folder = tmp_path_factory.mktemp("docs")
    small = folder / "models/small-encoder"
    tokenizer = tiny_tokenizer
    # As many layers as the small encoder has: the quickstart's config names some of them.
    size = {"num_hidden_layers": 12, "hidden_size": 16, "intermediate_size": 16, "max_position_embeddings": 520}
    model = make_encoder(vocab_size=len(tokenizer), **size)
    sample = ROOT / "data/samples/ko"
    corpus = read_jsonl(sample / "corpus.jsonl")[:40]
    features = tokenizer([passage["text"] for passage in corpus], padding=True, return_tensors="pt")
    with torch.no_grad():  # so that cosines of different texts are not all near 1
        states = model(**features).last_hidden_state[features["attention_mask"].bool()]
        model.encoder.layer[-1].output.LayerNorm.bias -= states.mean(0)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    settings = EmbeddingSettings("mean", True, "query: ", "passage: ")
    save_encoder(*load_encoder(folder / "base"), small, settings, max_length=128)
    for other in ("BAAI/bge-m3", "CreaLabs/bge-m3-ko-CLP-interMoE"):
        shutil.copytree(folder / "base", folder / other)

    (folder / "data").mkdir()
    (folder / "data/samples").symlink_to(ROOT / "data/samples")
    ids = {passage["id"] for passage in corpus}
    write_jsonl(folder / "collections/ko/corpus.jsonl", corpus)
    for split in ("train", "dev"):
        judgements = [line for line in read_jsonl(sample / f"{split}_qrels.jsonl") if line["docid"] in ids]
        judged = {line["qid"] for line in judgements}
        queries = [line for line in read_jsonl(sample / f"{split}_queries.jsonl") if line["id"] in judged]
        write_jsonl(folder / f"collections/ko/{split}_qrels.jsonl", judgements)
        write_jsonl(folder / f"collections/ko/{split}_queries.jsonl", queries)
    records = read_jsonl(sample / "train.jsonl")[:24]
    records[0]["neg_q"][0] = None  # something for a language model to write
    write_jsonl(folder / "train_ko.jsonl", records)
    articles = [
        {
            "title": f"제목 {number}",
            "paragraphs": [{"context": record["pos"][0], "qas": [{"id": f"q{number}", "question": record["query"]}]}],
        }
        for number, record in enumerate({record["pos"][0]: record for record in records}.values())
    ]
    (folder / "my_squad.json").write_text(json.dumps({"data": articles}), encoding="utf-8")

    # A config in the folder goes before the packaged one of that name: the same one, but shorter.
    quickstart = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text(encoding="utf-8"))
    quickstart |= {"max_steps": 2, "query_max_len": 32, "passage_max_len": 64, "eval_steps": 2, "save_steps": 2}
    quickstart |= {
        "dev_collection": "collections",
        "train_data": [str(folder / "train_ko.jsonl")],
        "bf16": False,
        "logging_steps": 1,
    }
    (folder / "quickstart.yaml").write_text(yaml.safe_dump(quickstart), encoding="utf-8")
    rows = {"base": {"train": False}, "trained": {"train": {"num_experts": 0, "trainable": "full"}}}
    ablation = {"model": "models/small-encoder", "rows": rows, "languages": {"ko": {"collection": "collections"}}}
    (folder / "my_ablation.yaml").write_text(yaml.safe_dump(ablation), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(config="quickstart", output_dir="runs/ko", cache_path=str(folder / "cache"))
        shutil.copytree("runs/ko", "runs/mine")
    return folder


@pytest.fixture(scope="module")
def language_model():
    """The address of the stand-in for a language model."""
    spec = importlib.util.spec_from_file_location("stand_in_llm", ROOT / "examples/stand_in_llm.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    server = ThreadingHTTPServer(("127.0.0.1", 0), module.Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=documents.name)
def test_python_blocks_run(page, place, language_model, tmp_path, monkeypatch):
    found = [block for block in documents.blocks(page, "python") if not block.not_run]
    text = "".join(block.text for block in found)
    if "synthesize(" in text or "judge(" in text:
        pytest.importorskip("openai")
    if "report(" in text:
        pytest.importorskip("matplotlib")
    shutil.copytree(place, tmp_path / "place", symlinks=True)
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    for made in re.findall(r'output(?:_dir)?="([^"]+)"', text):  # what the page itself makes
        shutil.rmtree(made) if Path(made).is_dir() else Path(made).unlink(missing_ok=True)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in found:
        code = block.text.replace("http://localhost:8000/v1", language_model)
        # Line numbers of a traceback are those of the page.
        exec(compile("\n" * (block.line - 1) + code, documents.name(page), "exec"), names)


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    pytest.importorskip("material")
    argv = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr  # --strict fails on a warning
    assert (tmp_path / "site/imgs/clpl.png").is_file()
