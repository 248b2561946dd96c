import json
import shutil

import ir_measures
import pytest
import torch

from clpl_moe import evaluate as evaluate_module
from clpl_moe.encoder import load_encoder
from clpl_moe.encoder.settings import EmbeddingSettings, write_settings
from clpl_moe.errors import UserError
from clpl_moe.evaluate import _labels, main
from clpl_moe.files import write_jsonl
from clpl_moe.retrieval.collection import Collection
from clpl_moe.retrieval.evaluation import evaluate_retrieval

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
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[-4:]]
    assert lines[0] == ["model", "language", "queries", "nDCG@5", "nDCG@10", "R@100"]
    values = {}
    for language, line in zip(("ko", "fa"), lines[1:]):
        content = json.loads((output / language / "metrics.json").read_text())
        collection = Collection.load(collections, language, "dev")
        # The metrics are those of the run file.
        measures = [ir_measures.parse_measure(name) for name in content["metrics"]]
        trec = list(ir_measures.read_trec_run(str(output / language / "run.trec")))
        expected = ir_measures.calc_aggregate(measures, collection.qrels, trec)
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
    table = capsys.readouterr().out.splitlines()[-1].split()
    shutil.copytree(tiny_encoder, tmp_path / "moved")
    shutil.copytree(collections, tmp_path / "moved data")
    monkeypatch.setattr(evaluate_module, "_evaluate_one", lambda *a: pytest.fail("computed again"))
    run(tmp_path / "moved", tmp_path / "moved data", output, batch_tokens=99)
    printed = capsys.readouterr().out
    assert "not computed again" in printed
    assert printed.splitlines()[-1].split() == ["moved", *table[1:]]
    assert (output / "ko" / "metrics.json").read_text() == before


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
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-2:]]
    assert [row[0] for row in rows] == ["a_checkpoint-1", "b_checkpoint-1"]
    contents = [json.loads((output / row[0] / "ko" / "metrics.json").read_text()) for row in rows]
    assert [content["model"] for content in contents] == [str(first), str(second)]
    assert contents[0]["model_hash"] != contents[1]["model_hash"]
    run(first, collections, tmp_path / "alone")
    alone = json.loads((tmp_path / "alone" / "ko" / "metrics.json").read_text())
    assert alone["metrics"] == contents[0]["metrics"]


def test_labels():
    assert _labels(["runs/a", "runs/b"]) == ["a", "b"]
    assert _labels(["x/best", "y/best", "hub/other"]) == ["x_best", "y_best", "hub_other"]
    assert _labels(["same", "same"]) == ["same_1", "same_2"]


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
        ({"passage_max_len": 300}, "--passage_max_len: found 300"),
        ({"query_max_len": 2}, "--query_max_len: found 2, expected at least 3"),
        ({"batch_tokens": 0}, "--batch_tokens: found 0, expected at least 1"),
        ({"languages": ("../ko",)}, "expected the name of a folder"),
        ({"metrics": "ndcg@5"}, "metric 'ndcg@5'"),
        ({"top_k": 0}, "--top_k: found 0"),
        ({"split": "test"}, "the splits here are dev"),
        ({"dtype": "float16"}, "dtype"),
        ({"pooling": "max"}, "pooling"),
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
    from clpl_moe.mine import main as mine_main

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
