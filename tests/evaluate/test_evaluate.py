import csv
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import ir_measures
import pytest
import torch

from clpl_moe import evaluate as evaluate_module
from clpl_moe.common.errors import UserError
from clpl_moe.common.files import write_jsonl
from clpl_moe.encoder import load_encoder
from clpl_moe.encoder.settings import EmbeddingSettings, write_settings
from clpl_moe.evaluate import EvaluateArguments, evaluate, model_labels
from clpl_moe.evaluate.__main__ import main
from clpl_moe.evaluate.evaluation import evaluate_retrieval
from clpl_moe.evaluate.metrics import EVALUATION_METRICS, M3_SCORES, evaluate_run, read_trec_run
from clpl_moe.evaluate.significance import compare
from clpl_moe.retrieval.collection import Collection
from clpl_moe.retrieval.options import EncodingArguments, open_encoder

TEXTS = [f"{a} {b}" for a in ("red", "blue", "green", "white") for b in ("house", "river", "stone", "cloud", "bird")]


def make_collection(folder, language, copies=0):
    """Queries are passages with a letter more; some passages are there several times (ties)."""
    texts = TEXTS + TEXTS[:1] * copies
    folder = folder / language
    write_jsonl(folder / "corpus.jsonl", ({"id": f"p{i}", "text": text} for i, text in enumerate(texts)))
    write_jsonl(folder / "dev_queries.jsonl", ({"id": f"q{i}", "text": f"{TEXTS[i]}s"} for i in range(8)))
    write_jsonl(folder / "dev_qrels.jsonl", ({"qid": f"q{i}", "docid": f"p{i}", "relevance": 1} for i in range(8)))
    return folder.parent


@pytest.fixture
def collections(tmp_path):
    make_collection(tmp_path / "data", "ko")
    return make_collection(tmp_path / "data", "fa", copies=3)


def run(models, collections, output, languages=("ko",), **options):
    models = models if isinstance(models, list) else [models]
    argv = ["--model", *map(str, models), "--languages", *languages]
    options = {
        "collection": collections,
        "output": output,
        "passage_max_len": 100,
        "dtype": "float32",
    } | options
    main(argv + [f"--{key}={value}" for key, value in options.items()])


def table(printed):
    """The words of each line of the table of results."""
    lines = printed.splitlines()
    start = next(number for number, line in enumerate(lines) if line.split()[:1] == ["model"])
    return [line.split() for line in lines[start : lines.index("", start)]]


def changed_copy(model, folder):
    model, tokenizer = load_encoder(model)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_files_and_table(tiny_encoder, collections, tmp_path, capsys):
    output = tmp_path / "out"
    run(tiny_encoder, collections, output, languages=("ko", "fa"))
    lines = table(capsys.readouterr().out)
    assert len(lines) == 4
    assert lines[0] == ["model", "language", "queries", *EVALUATION_METRICS]
    values = {}
    for language, line in zip(("ko", "fa"), lines[1:]):
        content = json.loads((output / language / "metrics.json").read_text())
        collection = Collection.load(collections, language, "dev")
        # The metrics are those of the files.
        measures = [ir_measures.parse_measure(name) for name in content["metrics"]]
        trec = list(ir_measures.read_trec_run(str(output / language / "run.trec")))
        qrels = list(ir_measures.read_trec_qrels(str(output / language / "qrels.trec")))
        expected = ir_measures.calc_aggregate(measures, qrels, trec)
        assert content["metrics"] == {str(m): value for m, value in expected.items()}
        assert len(trec) == 8 * len(collection.passages)
        assert line == [tiny_encoder.name, language, "8", *(f"{v:.4f}" for v in content["metrics"].values())]
        assert content["collection_hash"] == collection.fingerprint()
        assert content["settings"]["pooling"] == "cls"
        assert content["settings"]["dtype"] == "float32"
        assert content["model"] == str(tiny_encoder)
        assert content["passages_per_second"] > 0
        assert set(content["seconds"]) == {"encode_passages", "encode_queries", "search", "score"}
        assert {"torch", "transformers", "ir_measures", "clpl_moe"} < set(content["versions"])
        values[language] = content["metrics"]["nDCG@5"]
    assert lines[3][:2] == [tiny_encoder.name, "average"]
    assert lines[3][2] == f"{sum(values.values()) / 2:.4f}"
    # Related texts are found: far above chance, which is 0.15.
    assert values["ko"] > 0.5


def test_same_content_is_reused_wherever_it_lies(tiny_encoder, collections, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    run(tiny_encoder, collections, output)
    before = (output / "ko" / "metrics.json").read_text()
    before_table = table(capsys.readouterr().out)
    shutil.copytree(tiny_encoder, tmp_path / "moved")
    shutil.copytree(collections, tmp_path / "moved data")
    monkeypatch.setattr(evaluate_module, "_evaluate_dense", lambda *a: pytest.fail("computed again"))
    run(tmp_path / "moved", tmp_path / "moved data", output, batch_tokens=99)
    printed = capsys.readouterr().out
    assert "not computed again" in printed
    assert table(printed)[-1] == ["moved", *before_table[-1][1:]]
    assert (output / "ko" / "metrics.json").read_text() == before


def test_results_renamed_with_their_collection_are_reused(tiny_encoder, collections, tmp_path, monkeypatch):
    output = tmp_path / "out"
    options = {"m3_scores": True, "rerank_top": 5}
    run(tiny_encoder, collections, output, **options)
    collections = collections.rename(tmp_path / "moved")
    for folder in (collections, output):
        (folder / "ko").rename(folder / "kor")
    monkeypatch.setattr(evaluate_module, "_evaluate_dense", lambda *a: pytest.fail("computed again"))
    monkeypatch.setattr(evaluate_module, "_evaluate_heads", lambda *a: pytest.fail("computed again"))
    arguments = EvaluateArguments([str(tiny_encoder)], str(collections), ["kor"], str(output), **options)
    found = evaluate(arguments, EncodingArguments(passage_max_len=100, dtype="float32")).results
    names = ("model", "language", "split", "collection")
    assert len(found) == 1 + len(M3_SCORES)
    assert {tuple(r[name] for name in names) for r in found} == {(str(tiny_encoder), "kor", "dev", str(collections))}
    assert {row["language"] for row in read_csv(output / "per_query.csv")} == {"kor"}


def test_on_a_cpu_freed_memory_is_kept(tiny_encoder, monkeypatch):
    calls = []
    monkeypatch.setattr("clpl_moe.common.allocator.keep_freed_memory", lambda: calls.append(True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    open_encoder(str(tiny_encoder), EncodingArguments())
    assert calls == [True]


@pytest.mark.parametrize("what", ["model", "collection", "settings", "unreadable", "run only"])
def test_other_content_is_refused(tiny_encoder, collections, tmp_path, capsys, what):
    output = tmp_path / "out"
    model, options = tiny_encoder, {}
    if what == "model":
        # Same base name, other weights.
        model = shutil.copytree(tiny_encoder, tmp_path / "a" / "checkpoint-1")
    run(model, collections, output)
    if what == "model":
        model = changed_copy(tiny_encoder, tmp_path / "b" / "checkpoint-1")
    elif what == "collection":
        make_collection(collections, "ko", copies=1)
    elif what == "settings":
        options = {"query_prompt": "query: "}
    elif what == "unreadable":
        (output / "ko" / "metrics.json").write_text("{")
    else:
        (output / "ko" / "metrics.json").unlink()
    before = (output / "ko" / "run.trec").read_text()
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        run(model, collections, output, **options)
    assert exit.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "--overwrite true" in message
    assert str(output / "ko") in message
    assert (output / "ko" / "run.trec").read_text() == before
    run(model, collections, output, overwrite="true", **options)
    content = json.loads((output / "ko" / "metrics.json").read_text())
    assert content["model"] == str(model)
    if what not in ("unreadable", "run only"):
        assert (output / "ko" / "run.trec").read_text() != before


def test_an_interrupted_overwrite_leaves_no_metrics_beside_a_run_of_something_else(
    tiny_encoder, collections, tmp_path, monkeypatch
):
    run(tiny_encoder, collections, tmp_path / "out")

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate_module, "write_trec_run", interrupted)
    with pytest.raises(SystemExit):
        run(tiny_encoder, collections, tmp_path / "out", query_prompt="x", overwrite="true")
    assert not (tmp_path / "out" / "ko" / "metrics.json").exists()


def test_several_models(tiny_encoder, collections, tmp_path, capsys):
    output = tmp_path / "out"
    first = shutil.copytree(tiny_encoder, tmp_path / "a" / "checkpoint-1")
    second = changed_copy(tiny_encoder, tmp_path / "b" / "checkpoint-1")
    run([first, second], collections, output)
    rows = table(capsys.readouterr().out)[1:]
    assert [row[0] for row in rows] == ["a_checkpoint-1", "b_checkpoint-1"]
    contents = [json.loads((output / row[0] / "ko" / "metrics.json").read_text()) for row in rows]
    assert [content["model"] for content in contents] == [str(first), str(second)]
    assert contents[0]["model_hash"] != contents[1]["model_hash"]
    run(first, collections, tmp_path / "alone")
    alone = json.loads((tmp_path / "alone" / "ko" / "metrics.json").read_text())
    assert alone["metrics"] == contents[0]["metrics"]


def read_csv(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_values_of_each_query(tiny_encoder, collections, tmp_path):
    queries = collections / "ko" / "dev_queries.jsonl"
    records = [json.loads(line) for line in queries.read_text().splitlines()]
    records[3]["text"] = 'the "red", house\nof 한국어'
    write_jsonl(queries, records[::-1])
    (collections / "ko" / "dev_qrels.jsonl").write_text(
        "".join(
            f'{{"qid": "q{i}", "docid": "{d}", "relevance": {r}}}\n'
            for i, d, r in [(3, "p3", 1), (1, "gone", 2), (2, "p2", 0)]
        )
    )
    second = changed_copy(tiny_encoder, tmp_path / "second")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are those of the collection
        run([tiny_encoder, second], collections, tmp_path / "out", languages=("fa", "ko"))
    rows = read_csv(tmp_path / "out" / "per_query.csv")
    assert [(row["language"], row["query_id"]) for row in rows[-3:]] == [("ko", "q3"), ("ko", "q2"), ("ko", "q1")]
    assert len(rows) == 8 + 3  # the judged ones
    assert rows[8]["query"] == records[3]["text"]
    assert list(rows[0])[3:7] == ["nDCG@5 tiny", "nDCG@5 second", "nDCG@10 tiny", "nDCG@10 second"]
    for label in ("tiny", "second"):
        for language in ("fa", "ko"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                qrels = Collection.load(collections, language, "dev").qrels
            ranked = read_trec_run(tmp_path / "out" / label / language / "run.trec")
            means, per_query = evaluate_run(qrels, ranked, EVALUATION_METRICS)
            own = [row for row in rows if row["language"] == language]
            for name in EVALUATION_METRICS:
                assert {row["query_id"]: float(row[f"{name} {label}"]) for row in own} == {
                    query_id: values[name] for query_id, values in per_query.items()
                }
            content = json.loads((tmp_path / "out" / label / language / "metrics.json").read_text())
            assert content["metrics"] == means
    # A query without a relevant passage in the corpus, or at all.
    assert {row["R@1000 tiny"] for row in rows[-2:]} == {"0.0"}


def test_models_are_compared_pair_by_pair(tiny_encoder, collections, tmp_path, capsys):
    output = tmp_path / "out"
    models = [
        tiny_encoder,
        changed_copy(tiny_encoder, tmp_path / "b"),
        shutil.copytree(tiny_encoder, tmp_path / "same"),
    ]
    run(models[0], collections, output)
    assert not (output / "significance.json").exists()
    assert set(read_csv(output / "per_query.csv")[0]) > {"nDCG@10 tiny"}
    argv = [
        "--model",
        *map(str, models),
        "--collection",
        str(collections),
        "--output",
        str(output),
        "--languages",
        "ko",
        "fa",
    ]
    argv += ["--passage_max_len", "100", "--dtype", "float32", "--compare_metric", "RR@10", "R@100"]
    main(argv)
    printed = capsys.readouterr().out
    content = json.loads((output / "significance.json").read_text())
    assert "randomisation test" in content["test"]
    found = content["comparisons"]
    names = [(c["language"], c["metric"], c["first"], c["second"]) for c in found]
    pairs = [("tiny", "b"), ("tiny", "same"), ("b", "same")]
    assert names == [(lang, m, *pair) for lang in ("ko", "fa") for m in ("RR@10", "R@100") for pair in pairs]
    rows = [row for row in read_csv(output / "per_query.csv") if row["language"] == "ko"]
    systems = {name: {row["query_id"]: float(row[f"RR@10 {name}"]) for row in rows} for name in ("tiny", "b", "same")}
    expected = compare(systems)
    for own, comparison in zip(found, expected):
        assert {key: own[key] for key in ("difference", "better", "worse", "p", "p_holm")} == {
            key: getattr(comparison, key) for key in ("difference", "better", "worse", "p", "p_holm")
        }
    assert found[1]["p"] == 1  # the same model
    assert found[0]["worse"] > 0
    lines = [line.split() for line in printed.splitlines() if line.startswith("b - tiny")]
    assert lines[0][3:5] == ["ko", "RR@10"]
    assert lines[0][-1] == f"{found[0]['p_holm']:.4f}"
    # Again: nothing but the comparison is computed, and it comes out the same.
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    main(argv)
    assert capsys.readouterr().out.count("not computed again") == 6
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("content", ["my,own,table\n", "x" * 200_000])
def test_a_table_of_something_else_is_not_replaced(tiny_encoder, collections, tmp_path, capsys, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "per_query.csv").write_text(content)
    with pytest.raises(SystemExit):
        run(tiny_encoder, collections, tmp_path / "out")
    assert "per_query.csv: found another file" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["per_query.csv"]


def test_scores_of_the_heads(tiny_encoder, collections, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    run(tiny_encoder, collections, output)
    dense = (output / "ko" / "run.trec").read_text()
    # The dense run is there, so that only its first passages are encoded again.
    with monkeypatch.context() as patch:
        patch.setattr(evaluate_module, "_evaluate_dense", lambda *a: pytest.fail("computed again"))
        run(tiny_encoder, collections, output, m3_scores=True, rerank_top=5)
    lines = table(capsys.readouterr().out.split("not computed again")[-1])
    assert lines[0] == ["model", "score", "language", "queries", *EVALUATION_METRICS]
    assert [line[1] for line in lines[1:]] == ["dense", *M3_SCORES]
    assert (output / "ko" / "run.trec").read_text() == dense
    first = {query_id: list(scores)[:5] for query_id, scores in read_trec_run(output / "ko" / "run.trec").items()}
    content = json.loads((output / "ko" / "metrics.m3.json").read_text())
    assert content["settings"]["m3_weights"] == [1.0, 0.3, 1.0]
    qrels = Collection.load(collections, "ko", "dev").qrels
    rankings = []
    for line, score in zip(lines[2:], M3_SCORES):
        ranked = read_trec_run(output / "ko" / f"run.{score}.trec")
        assert {query_id: set(scores) for query_id, scores in ranked.items()} == {
            q: set(ids) for q, ids in first.items()
        }
        metrics, _ = evaluate_run(qrels, ranked, EVALUATION_METRICS)
        assert content["metrics"][score] == metrics
        assert line[4:] == [f"{value:.4f}" for value in metrics.values()]
        rankings.append([list(scores) for scores in ranked.values()])
    assert rankings[0] != rankings[1] != rankings[3]
    header = list(read_csv(output / "per_query.csv")[0])
    assert header[3:8] == ["nDCG@5 tiny", *(f"nDCG@5 tiny {score}" for score in M3_SCORES)]
    # Nothing twice, and nothing of something else replaced.
    monkeypatch.setattr(evaluate_module, "_evaluate_heads", lambda *a: pytest.fail("computed again"))
    run(tiny_encoder, collections, output, m3_scores=True, rerank_top=5)
    with pytest.raises(SystemExit):
        run(tiny_encoder, collections, output, m3_scores=True, rerank_top=6)
    assert "metrics.m3.json: holds results of something else (other settings)" in capsys.readouterr().err
    # What a killed command left of them is made again.
    (output / "ko" / "metrics.m3.json").unlink()
    monkeypatch.undo()
    run(tiny_encoder, collections, output, m3_scores=True, rerank_top=5)
    assert json.loads((output / "ko" / "metrics.m3.json").read_text())["metrics"] == content["metrics"]
    # Other dense results take the old scores away.
    run(tiny_encoder, collections, output, overwrite=True, query_prompt="q ")
    assert sorted(path.name for path in (output / "ko").iterdir()) == ["metrics.json", "qrels.trec", "run.trec"]


def test_models_with_and_without_heads(tiny_encoder, collections, tmp_path, capsys):
    bare = changed_copy(tiny_encoder, tmp_path / "bare")
    with pytest.raises(SystemExit):
        run(bare, collections, tmp_path / "out", m3_scores=True)
    assert "no model has sparse and multi-vector heads" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    second = shutil.copytree(tiny_encoder, tmp_path / "second")
    torch.manual_seed(1)
    torch.save(torch.nn.Linear(32, 1).state_dict(), second / "sparse_linear.pt")
    run([tiny_encoder, bare, second], collections, tmp_path / "out", m3_scores=True)
    printed = capsys.readouterr().out
    assert "bare: no sparse_linear.pt and colbert_linear.pt; it is evaluated by its dense embeddings only" in printed
    assert [line[0] for line in table(printed)[1:]] == ["tiny"] * 5 + ["bare"] + ["second"] * 5
    found = json.loads((tmp_path / "out" / "significance.json").read_text())["comparisons"]
    pairs = [(c["score"], c["first"], c["second"]) for c in found]
    expected = [("dense", "tiny", "bare"), ("dense", "tiny", "second"), ("dense", "bare", "second")]
    assert pairs == expected + [(score, "tiny", "second") for score in M3_SCORES]
    assert found[1]["p"] == 1
    metrics = [json.loads((tmp_path / "out" / m / "ko" / "metrics.m3.json").read_text()) for m in ("tiny", "second")]
    assert metrics[0]["metrics"]["multi-vec"] == metrics[1]["metrics"]["multi-vec"]
    assert metrics[0]["heads_hash"] != metrics[1]["heads_hash"]


def hub_of(folder, home):
    """Puts a model folder into a hub cache, as a download would; its name."""
    cache = home / "hub" / "models--someone--their-model"
    shutil.copytree(folder, cache / "snapshots" / ("0" * 40))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0" * 40)
    for name in ("modules.json", "config_sentence_transformers.json"):  # known not to be there
        (cache / ".no_exist" / ("0" * 40)).mkdir(parents=True, exist_ok=True)
        (cache / ".no_exist" / ("0" * 40) / name).touch()
    return "someone/their-model"


SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "eval_miracl.sh"


def fake_environment(folder, activate):
    """A virtual environment that looks ready, so that the script does not install one."""
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)
    (folder / "bin" / "activate").write_text(activate)
    (folder / ".installed").touch()
    return folder


@pytest.mark.parametrize(
    ("arguments", "variables", "evaluated", "prepared"),
    [
        (["BAAI/bge-m3"], {}, "BAAI/bge-m3 {root}/data/miracl ko fa hi {root}/results/miracl/bge-m3", "ko fa hi"),
        (
            ["mine", "ko", "--top_k", "9"],
            {},
            "{here}/mine {root}/data/miracl ko {root}/results/miracl/mine --top_k 9",
            "ko",
        ),
        (["mine", "b/c", "--"], {}, "{here}/mine b/c {root}/data/miracl ko fa hi {root}/results/miracl", "ko fa hi"),
        (["mine", "b/c", "--", "fa"], {"COLLECTION": "own"}, "{here}/mine b/c {here}/own fa {root}/results/own", ""),
        (["a"], {"COLLECTION": "/own", "OUTPUT": "out", "GPUS": "2"}, "torchrun a /own ko fa hi {here}/out", ""),
        (
            ["a", "hi"],
            {"MIRACL_SOURCE": "files"},
            "a {root}/data/miracl hi {root}/results/miracl/a",
            "hi from {here}/files",
        ),
        # A folder goes by its own name.
        ([".", "hi"], {"COLLECTION": "."}, "{here} {here} hi {root}/results/{here.name}/{here.name}", ""),
        (["mine/", "hi"], {"COLLECTION": "mine/."}, "{here}/mine {here}/mine hi {root}/results/mine/mine", ""),
    ],
)
def test_what_the_script_runs(tmp_path, arguments, variables, evaluated, prepared):
    (tmp_path / "mine").mkdir()
    venv = fake_environment(tmp_path / "venv", 'PATH="$VENV/fake:$PATH"\n')
    (venv / "fake").mkdir()
    for name in ("python", "torchrun"):  # exec takes no function
        (venv / "fake" / name).write_text(f'#!/bin/sh\npwd >> "{tmp_path}/from"\necho {name} "$@"\n')
        (venv / "fake" / name).chmod(0o755)
    environment = {**os.environ, "VENV": str(venv), **variables}
    done = subprocess.run(
        ["bash", str(SCRIPT), *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    *before, last = done.stdout.splitlines()
    known = ("python", "-m", "clpl_moe.evaluate", "--model", "--collection", "--languages", "--output")
    words = [word for word in last.split() if word not in (*known, "--standalone", "--nproc_per_node", "2")]
    assert " ".join(words) == evaluated.format(here=tmp_path, root=SCRIPT.parents[1])
    assert set((tmp_path / "from").read_text().split()) == {str(tmp_path)}  # where paths in options are the caller's
    sources = {line.split("--source ")[1] for line in before if "--source" in line}
    languages = [line.split()[4] for line in before]
    assert " ".join([*languages, *(f"from {source}" for source in sources)]) == prepared.format(here=tmp_path)
    assert all(line.startswith("python -m clpl_moe.prepare --miracl") for line in before)


def test_the_script_without_a_model():
    done = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage: scripts/eval_miracl.sh MODEL" in done.stderr


@pytest.mark.slow
def test_every_kind_of_model_through_the_script(tiny_encoder, tiny_tokenizer, collections, tmp_path):
    """A hub name, a stock folder with heads, a folder of ours and one of 2024, on a local collection without a network."""
    from clpl_moe import MoEConfig, inject_moe, save_encoder
    from encoder.test_load import config_2024, state_2024, stock_config, write_folder
    from helpers.tiny import perturb_experts

    encoder, _ = load_encoder(tiny_encoder)
    encoder = inject_moe(encoder, MoEConfig(num_experts=2, router="topk_softmax"))
    perturb_experts(encoder)
    save_encoder(encoder, tiny_tokenizer, tmp_path / "ours")
    config = config_2024("intermediate", 2, 1, **stock_config(encoder))
    write_folder(tmp_path / "of-2024", config, state_2024(encoder, "intermediate"), tiny_tokenizer)
    for folder in ("ours", "of-2024"):
        for file in ("sparse_linear.pt", "colbert_linear.pt"):
            shutil.copy(tiny_encoder / file, tmp_path / folder / file)
    name = hub_of(tiny_encoder, tmp_path / "home")
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "VENV": str(fake_environment(tmp_path / "venv", f'PATH="{Path(sys.executable).parent}:$PATH"\n')),
        "COLLECTION": "data",
        "OUTPUT": "results",
        "PYTHONPATH": str(SCRIPT.parents[1] / "src"),
    }

    def script(*arguments, **variables):
        command = ["bash", str(SCRIPT), *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, env=environment | variables, capture_output=True, text=True)

    options = ["--passage_max_len", "100", "--dtype", "float32", "--m3_scores", "true"]
    done = script(name, tiny_encoder, "ours", "of-2024", "--", "ko", "fa", *options)
    assert done.returncode == 0, done.stderr
    metrics = {
        (label, kind): json.loads((tmp_path / "results" / label / "fa" / f"metrics{kind}.json").read_text())["metrics"]
        for label in ("their-model", "tiny", "ours", "of-2024")
        for kind in ("", ".m3")
    }
    for kind in ("", ".m3"):
        assert metrics["their-model", kind] == metrics["tiny", kind]
        assert metrics["ours", kind] == metrics["of-2024", kind] != metrics["tiny", kind]
    assert "their-model" in done.stdout
    # In two processes: the same, said once.
    done = script(tiny_encoder, "fa", *options, GPUS="2", OUTPUT="two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("values of each query") == 1
    for kind in ("", ".m3"):
        assert (
            json.loads((tmp_path / "two" / "fa" / f"metrics{kind}.json").read_text())["metrics"]
            == metrics["tiny", kind]
        )


def test_a_query_does_not_find_itself(tiny_encoder, tmp_path):
    """As in BEIR; but where it is judged relevant, or the passage only has the same id."""
    folder = tmp_path / "ko"
    texts = {"a": "apple brick cloud", "b": "drum eagle flame", "c": "grape honey ivory", "d": "a b c"}
    write_jsonl(folder / "corpus.jsonl", ({"id": k, "title": "title", "text": v} for k, v in texts.items()))
    queries = {"a": texts["a"], "b": texts["b"], "d": "something else"}
    write_jsonl(folder / "dev_queries.jsonl", ({"id": k, "text": v} for k, v in queries.items()))
    qrels = [("a", "b"), ("b", "b"), ("d", "a")]
    write_jsonl(folder / "dev_qrels.jsonl", ({"qid": q, "docid": p, "relevance": 1} for q, p in qrels))
    collection = Collection.load(tmp_path, "ko", "dev")
    assert collection.own_passages() == {"a": 0}
    for top_k in (2, 10):
        model, tokenizer = load_encoder(tiny_encoder)
        found = evaluate_retrieval(
            model, tokenizer, collection, settings=EmbeddingSettings(), passage_max_len=50, top_k=top_k
        ).run
        assert "a" not in found["a"]
        assert [len(found[q]) for q in queries] == ([2, 2, 2] if top_k == 2 else [3, 4, 4])


def test_labels():
    assert model_labels(["runs/a", "runs/b"]) == ["a", "b"]
    assert model_labels(["x/best", "y/best", "hub/other"]) == ["x_best", "y_best", "hub_other"]
    assert model_labels(["same", "same"]) == ["same_1", "same_2"]
    assert model_labels(["/"]) == ["root"]


def test_prompts_and_pooling_come_from_the_folder_and_can_be_overridden(tiny_encoder, collections, tmp_path):
    model = shutil.copytree(tiny_encoder, tmp_path / "model")
    settings = EmbeddingSettings("mean", False, "query: ", "passage: ")
    write_settings(model, settings, max_length=100, hidden_size=32)
    run(model, collections, tmp_path / "out")
    from_folder = json.loads((tmp_path / "out" / "ko" / "metrics.json").read_text())
    assert from_folder["settings"]["pooling"] == "mean"
    assert from_folder["settings"]["normalize"]  # similarity is the cosine
    assert from_folder["settings"]["passage_prompt"] == "passage: "
    overrides = {"pooling": "cls", "query_prompt": "", "passage_prompt": ""}
    run(model, collections, tmp_path / "overridden", **overrides)
    overridden = json.loads((tmp_path / "overridden" / "ko" / "metrics.json").read_text())
    assert {key: overridden["settings"][key] for key in overrides} == overrides
    run(tiny_encoder, collections, tmp_path / "plain")
    name = "ko/run.trec"
    scores = [
        [line.split()[2:5] for line in (tmp_path / folder / name).read_text().splitlines()]
        for folder in ("out", "overridden", "plain")
    ]
    assert scores[1] == scores[2] != scores[0]


def test_top_k_and_metrics(tiny_encoder, collections, tmp_path):
    argv = ["--model", str(tiny_encoder), "--collection", str(collections), "--output", str(tmp_path / "out")]
    argv += ["--languages", "fa", "--passage_max_len", "100", "--top_k", "3", "--metrics", "RR@10", "nDCG@3"]
    main(argv)
    assert list(json.loads((tmp_path / "out" / "fa" / "metrics.json").read_text())["metrics"]) == [
        "RR@10",
        "nDCG@3",
    ]
    assert len((tmp_path / "out" / "fa" / "run.trec").read_text().splitlines()) == 24


def test_result_of_the_function(tiny_encoder, collections):
    model, tokenizer = load_encoder(tiny_encoder)
    collection = Collection.load(collections, "fa", "dev")
    result = evaluate_retrieval(
        model,
        tokenizer,
        collection,
        settings=EmbeddingSettings(),
        query_max_len=50,
        passage_max_len=100,
        dtype=torch.float32,
        progress=False,
    )
    assert set(result.metrics) == {"nDCG@5", "nDCG@10", "R@100"}
    assert result.metrics["nDCG@5"] == pytest.approx(sum(v["nDCG@5"] for v in result.per_query.values()) / 8)
    ranked = list(result.run["q0"].items())
    assert len(ranked) == len(collection.passages)
    assert [score for _, score in ranked] == sorted((score for _, score in ranked), reverse=True)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[:] = float("nan")
    with pytest.raises(UserError, match="NaN or infinite embeddings"):
        evaluate_retrieval(model, tokenizer, collection, settings=EmbeddingSettings(), passage_max_len=100)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"passage_max_len": 300}, "passage_max_len is 300 tokens"),
        ({"query_max_len": 2}, "--query_max_len: found 2, expected at least 3"),
        ({"batch_tokens": 0}, "--batch_tokens: found 0, expected at least 1"),
        ({"languages": ("../ko",)}, "expected the name of a folder"),
        ({"metrics": "ndcg@5"}, "metric 'ndcg@5'"),
        ({"top_k": 0}, "--top_k: found 0"),
        ({"split": "test"}, "the splits here are dev"),
        ({"dtype": "float16"}, "dtype"),
        ({"pooling": "max"}, "pooling"),
        ({"compare_metric": "P@5"}, "--compare_metric: found P@5, expected some of --metrics: nDCG@5"),
        ({"rerank_top": 0}, "--rerank_top: found 0"),
        ({"m3_weights": "1"}, "--m3_weights: found 1.0, expected three"),
        ({"metric": "AP"}, "did you mean 'metrics'?"),
    ],
)
def test_mistakes_end_in_a_message(tiny_encoder, collections, tmp_path, capsys, options, words):
    with pytest.raises(SystemExit) as exit:
        run(tiny_encoder, collections, tmp_path / "out", **options)
    assert exit.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_fault_in_the_last_language_shows_before_any_work(tiny_encoder, collections, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        run(tiny_encoder, collections, tmp_path / "out", languages=("ko", "fa", "hi"))
    assert exit.value.code == 2
    assert "holds fa, ko" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_such_model(collections, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        run(tmp_path / "nowhere", collections, tmp_path / "out")
    assert exit.value.code == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_model_with_code_of_its_own_runs_only_if_trusted(tiny_encoder, collections, tmp_path, capsys):
    from clpl_moe.mine.__main__ import main as mine_main

    model = shutil.copytree(tiny_encoder, tmp_path / "model")
    (model / "own.py").write_text(
        "from transformers import XLMRobertaConfig, XLMRobertaModel\n"
        "class OwnConfig(XLMRobertaConfig):\n    model_type = 'own'\n"
        "class OwnModel(XLMRobertaModel):\n    config_class = OwnConfig\n"
    )
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}}
    (model / "config.json").write_text(json.dumps(config))
    mined = ["--model", str(model), "--collection", str(collections), "--language", "ko", "--split", "dev"]
    mined += ["--output", str(tmp_path / "mined.jsonl"), "--passage_max_len", "100", "--negatives", "1"]
    for command in (lambda: run(model, collections, tmp_path / "out"), lambda: mine_main(mined)):
        with pytest.raises(SystemExit) as exit:
            command()
        assert exit.value.code == 2
        assert "--trust_remote_code true" in capsys.readouterr().err.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "model"]
    run(model, collections, tmp_path / "out", trust_remote_code=True)
    run(tiny_encoder, collections, tmp_path / "stock")
    mine_main([*mined, "--trust_remote_code", "true"])
    first, second = (tmp_path / folder / "ko" / "run.trec" for folder in ("out", "stock"))
    ranked = [[line.split()[:5] for line in path.read_text().splitlines()] for path in (first, second)]
    assert ranked[0] == ranked[1]
