import json
import shutil

import ir_measures
import pytest
import torch

from clpl_moe import Encoder, MoEConfig, inject_moe
from clpl_moe.common.errors import UserError
from clpl_moe.encoder.settings import EmbeddingSettings, write_settings
from clpl_moe.evaluate import evaluate
from clpl_moe.evaluate.__main__ import main
from clpl_moe.evaluate.metrics import EVALUATION_METRICS, M3_SCORES, evaluate_run, read_trec_run
from clpl_moe.evaluate.options import EvaluateArguments
from clpl_moe.evaluate.significance import compare
from clpl_moe.moe.inject import expert_parameters
from clpl_moe.retrieval.collection import Collection
from clpl_moe.retrieval.options import EncodingArguments, open_encoder
from helpers.evaluating import changed_copy, read_csv, run, table


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


def test_on_a_cpu_freed_memory_is_kept(tiny_encoder, monkeypatch):
    calls = []
    monkeypatch.setattr("clpl_moe.common.allocator.keep_freed_memory", lambda: calls.append(True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    open_encoder(str(tiny_encoder), EncodingArguments())
    assert calls == [True]


def test_an_expert_of_a_model_without_any_is_refused_by_the_models_name(tiny_encoder):
    with pytest.raises(UserError, match=r"expert: \S*/tiny: the encoder has no experts with router given"):
        open_encoder(str(tiny_encoder), EncodingArguments(expert=1))


def test_an_expert_is_that_of_the_models_that_have_such(tiny_encoder, collections, tmp_path, capsys):
    encoder = inject_moe(Encoder.load(tiny_encoder, device="cpu"), MoEConfig(2, router="given"))
    with torch.no_grad():
        for _, parameter in expert_parameters(encoder.model):
            parameter[1] += 0.3
    encoder.save(tmp_path / "given")
    options = {"collection": collections, "languages": ["ko"], "passage_max_len": 100}

    def hashes(output, *models, **more):
        found = evaluate(model=list(models), output=tmp_path / output, **options, **more)
        return [result.about["model_hash"] for result in found.results]

    dense, given = hashes("none", tiny_encoder, tmp_path / "given")
    both = hashes("both", tiny_encoder, tmp_path / "given", expert=1)
    assert "tiny: no experts with router given; it is evaluated without expert" in capsys.readouterr().err
    assert both == [dense, *hashes("alone", tmp_path / "given", expert=1)]
    assert both[1] != given
    with pytest.raises(UserError, match=r"expert: \S*/tiny: no experts with router given"):
        hashes("refused", tiny_encoder, expert=1)


def test_truncated_embeddings(tiny_encoder, collections, tmp_path, capsys):
    cache = tmp_path / "cache"
    run(tiny_encoder, collections, tmp_path / "whole", cache_dir=cache)
    run(tiny_encoder, collections, tmp_path / "short", cache_dir=cache, truncate_dim=4, m3_scores=True)
    whole, short = (json.loads((tmp_path / name / "ko" / "metrics.json").read_text()) for name in ("whole", "short"))
    assert "truncate_dim" not in whole["settings"]
    assert short["settings"]["truncate_dim"] == 4
    collection = Collection.load(collections, "ko", "dev")
    encoder = open_encoder(str(tiny_encoder), EncodingArguments(dtype="float32", truncate_dim=4))
    scores = encoder.encode_queries(collection.queries[:1]) @ encoder.encode_passages(collection.passages).T
    found = read_trec_run(tmp_path / "short" / "ko" / "run.trec", collection)[collection.query_ids[0]]
    expected = dict(zip(collection.passage_ids, scores[0].tolist()))
    assert found == pytest.approx(expected, abs=2e-3)  # 16 bits on disk
    # The mean of dense and sparse scores is of the same dense ones.
    runs = {
        kind: read_trec_run(tmp_path / "short" / "ko" / f"run.{kind}.trec", collection)
        for kind in ("sparse", "dense+sparse")
    }
    mean, sparse = (runs[kind][collection.query_ids[0]] for kind in ("dense+sparse", "sparse"))
    assert mean == pytest.approx({p: (expected[p] + 0.3 * sparse[p]) / 1.3 for p in mean}, abs=2e-3)
    with pytest.raises(SystemExit):
        run(tiny_encoder, collections, tmp_path / "wide", truncate_dim=33)
    assert "truncate_dim: found 33, expected 1 to 32, the model's dimensions" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["int8", "binary"])
def test_quantized_search(tiny_encoder, collections, tmp_path, capsys, kind):
    options = {"languages": ("ko", "fa"), "top_k": 3, "metrics": "nDCG@5"}
    run(tiny_encoder, collections, tmp_path / "exact", **options)
    assert "quantized -" not in capsys.readouterr().out
    run(tiny_encoder, collections, tmp_path / "out", **options, quantize=kind, oversampling=1)
    printed = capsys.readouterr().out.splitlines()
    start = next(number for number, line in enumerate(printed) if line.startswith("quantized - exact"))
    for language, line in zip(("ko", "fa"), printed[start + 1 :]):
        exact, found = (
            json.loads((tmp_path / name / language / "metrics.json").read_text()) for name in ("exact", "out")
        )
        assert found["exact_metrics"] == exact["metrics"]
        assert found["settings"]["quantize"] == kind
        passages = found["passages"]
        assert found["bytes"] == {kind: passages * (32 if kind == "int8" else 4), "float32": passages * 128}
        loss = found["metrics"]["nDCG@5"] - exact["metrics"]["nDCG@5"]
        assert line.split() == [tiny_encoder.name, language, kind, f"{loss:+.4f}", "0.00", "0.00"]
    # The same results are found again, and those of another search are refused.
    run(tiny_encoder, collections, tmp_path / "out", **options, quantize=kind, oversampling=1)
    assert "quantized - exact" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(tiny_encoder, collections, tmp_path / "out", **options, quantize=kind)
    assert "holds results of something else (other settings)" in capsys.readouterr().err
    # Where all is scored again, nothing is lost.
    evaluation = evaluate(
        model=[tiny_encoder],
        collection=collections,
        languages=["ko"],
        output=tmp_path / "all",
        quantize=kind,
        passage_max_len=100,
        dtype="float32",
    )
    about = evaluation.results[0].about
    assert about["exact_metrics"] == evaluation.results[0].metrics == about["metrics"]


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
    assert capsys.readouterr().err.count("not computed again") == 6
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("line", ["q0 Q0 p99 1 9 x", "q99 Q0 p0 1 9 x"])
def test_a_run_file_with_an_id_that_the_collection_lacks_is_refused(tiny_encoder, collections, tmp_path, capsys, line):
    run(tiny_encoder, collections, tmp_path / "out")
    path = tmp_path / "out" / "ko" / "run.trec"
    path.write_text(f"{line}\n{path.read_text()}")
    for m3_scores in (False, True):
        with pytest.raises(SystemExit) as stop:
            run(tiny_encoder, collections, tmp_path / "out", m3_scores=m3_scores)
        assert stop.value.code == 2
        assert f"error: {path}:1: found '" in capsys.readouterr().err


def test_scores_of_the_heads(tiny_encoder, collections, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    run(tiny_encoder, collections, output)
    dense = (output / "ko" / "run.trec").read_text()
    # The dense run is there, so that only its first passages are encoded again.
    with monkeypatch.context() as patch:
        patch.setattr("clpl_moe.evaluate.evaluation.evaluate_retrieval", lambda *a, **k: pytest.fail("computed again"))
        run(tiny_encoder, collections, output, m3_scores=True, rerank_top=5)
    lines = table(capsys.readouterr().out.split("values of each query")[-2])
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
    monkeypatch.setattr("clpl_moe.evaluate.m3.rerank", lambda *a, **k: pytest.fail("computed again"))
    run(tiny_encoder, collections, output, m3_scores=True, rerank_top=5)
    with pytest.raises(SystemExit):
        run(tiny_encoder, collections, output, m3_scores=True, rerank_top=6)
    assert "metrics.m3.json: holds results of something else (other settings)" in capsys.readouterr().err
    # Runs for which no metrics vouch may be anyone's.
    (output / "ko" / "metrics.m3.json").unlink()
    monkeypatch.undo()
    with pytest.raises(SystemExit):
        run(tiny_encoder, collections, output, m3_scores=True, rerank_top=5)
    assert "run.sparse.trec: a file without metrics.m3.json beside it is in the way" in capsys.readouterr().err
    run(tiny_encoder, collections, output, m3_scores=True, rerank_top=5, overwrite=True)
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
    printed = capsys.readouterr()
    assert (
        "bare: no sparse_linear.pt and colbert_linear.pt; it is evaluated by its dense embeddings only" in printed.err
    )
    assert [line[0] for line in table(printed.out)[1:]] == ["tiny"] * 5 + ["bare"] + ["second"] * 5
    found = json.loads((tmp_path / "out" / "significance.json").read_text())["comparisons"]
    pairs = [(c["score"], c["first"], c["second"]) for c in found]
    expected = [("dense", "tiny", "bare"), ("dense", "tiny", "second"), ("dense", "bare", "second")]
    assert pairs == expected + [(score, "tiny", "second") for score in M3_SCORES]
    assert found[1]["p"] == 1
    metrics = [json.loads((tmp_path / "out" / m / "ko" / "metrics.m3.json").read_text()) for m in ("tiny", "second")]
    assert metrics[0]["metrics"]["multi-vec"] == metrics[1]["metrics"]["multi-vec"]
    assert metrics[0]["heads_hash"] != metrics[1]["heads_hash"]


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


@pytest.mark.parametrize("weights", [[1e300, 1, 1], [1e-320, 0, 0], [float("nan"), 1, 1], [-1, 1, 1], [0, 0, 1]])
def test_weights_that_give_no_numbers_are_refused(tmp_path, weights):
    with pytest.raises(UserError, match="m3_weights: found .*, expected three, each 0 or from 1e-6 to 1e6"):
        EvaluateArguments(["m"], "c", ["ko"], str(tmp_path), m3_scores=True, m3_weights=weights)


def test_a_model_that_is_named_again_keeps_its_place(tiny_encoder, collections, tmp_path):
    other = changed_copy(tiny_encoder, tmp_path / "other")
    again = f"{tiny_encoder.parent}/./{tiny_encoder.name}/"
    options = {"collection": collections, "languages": ["ko"], "passage_max_len": 100}
    found = evaluate(model=[tiny_encoder, other, again], output=tmp_path / "out", **options)
    assert [result.label for result in found.results] == ["tiny", "other"]
    assert [(c["first"], c["second"]) for c in found.comparisons] == [("tiny", "other")]


def test_top_k_and_metrics(tiny_encoder, collections, tmp_path, capsys):
    argv = ["--model", str(tiny_encoder), "--collection", str(collections), "--output", str(tmp_path / "out")]
    argv += ["--languages", "fa", "--passage_max_len", "100", "--top_k", "3", "--metrics", "RR@10", "nDCG@3", "AP"]
    main(argv)
    assert list(json.loads((tmp_path / "out" / "fa" / "metrics.json").read_text())["metrics"]) == [
        "RR@10",
        "nDCG@3",
        "AP",
    ]
    assert len((tmp_path / "out" / "fa" / "run.trec").read_text().splitlines()) == 24
    assert "warning: RR@10, AP: only 3 passages are retrieved for each query (top_k)" in capsys.readouterr().err
    run(tiny_encoder, collections, tmp_path / "all", top_k=20, m3_scores=True)  # as many as there are
    assert "warning: " not in capsys.readouterr().err
    run(tiny_encoder, collections, tmp_path / "few", m3_scores=True, rerank_top=5, metrics="nDCG@10")
    assert "warning: nDCG@10: only 5 passages are ranked by m3_scores for each" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"passage_max_len": 300}, "passage_max_len: found 300 tokens"),
        ({"query_max_len": 2}, "--query_max_len: found 2, expected at least 3"),
        ({"batch_tokens": 0}, "--batch_tokens: found 0, expected at least 1"),
        ({"languages": ("../ko",)}, "expected the name of a folder"),
        ({"metrics": "ndcg@5"}, "metric 'ndcg@5'"),
        ({"top_k": 0}, "--top_k: found 0"),
        ({"split": "test"}, "the splits here are dev"),
        ({"dtype": "float16"}, "dtype"),
        ({"pooling": "max"}, "pooling"),
        ({"compare_metric": "P@5"}, "--compare_metric: found P@5, expected some of metrics: nDCG@5"),
        ({"rerank_top": 0}, "--rerank_top: found 0"),
        ({"m3_weights": "1"}, "--m3_weights: found 1.0, expected three"),
        ({"rerank_top": 7}, "--rerank_top: goes with m3_scores, which is not set"),
        ({"oversampling": 7}, "--oversampling: goes with quantize or index approximate; neither is set"),
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
        assert "if you trust it, set trust_remote_code to true" in capsys.readouterr().err.splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "model"]
    run(model, collections, tmp_path / "out", trust_remote_code=True)
    run(tiny_encoder, collections, tmp_path / "stock")
    mine_main([*mined, "--trust_remote_code", "true"])
    first, second = (tmp_path / folder / "ko" / "run.trec" for folder in ("out", "stock"))
    ranked = [[line.split()[:5] for line in path.read_text().splitlines()] for path in (first, second)]
    assert ranked[0] == ranked[1]


def test_called_from_python(tiny_encoder, collections, tmp_path, capsys):
    other = changed_copy(tiny_encoder, tmp_path / "other")
    options = {"collection": collections, "languages": ["ko", "fa"], "passage_max_len": 100, "dtype": "float32"}
    found = evaluate(model=[tiny_encoder, other], output=tmp_path / "out", **options)
    assert "nDCG" not in capsys.readouterr().out
    assert [(r.label, r.language, r.score) for r in found.results] == [
        (label, language, "dense") for label in ("tiny", "other") for language in ("ko", "fa")
    ]
    for result in found.results:
        assert result.folder == tmp_path / "out" / result.label / result.language
        assert result.about == json.loads((result.folder / "metrics.json").read_text())
        assert result.metrics == result.about["metrics"]
        values = [of_query["AP"] for of_query in result.per_query.values()]
        assert sum(values) / 8 == pytest.approx(result.metrics["AP"])
    assert found.comparisons == json.loads((tmp_path / "out" / "significance.json").read_text())["comparisons"]
    assert found.table == tmp_path / "out" / "per_query.csv"
    assert [line[0] for line in table(f"{found}\n")[1:]] == ["tiny"] * 3 + ["other"] * 3
    (tmp_path / "c.yaml").write_text(f"model: {tiny_encoder}\nlanguages: [ko]\n")
    alone = evaluate(config=tmp_path / "c.yaml", output=tmp_path / "alone", **options | {"languages": ["fa"]})
    assert alone.results[0].metrics == found.results[1].metrics
    assert alone.comparisons == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modle": "x"}, r"evaluate\(\): unknown argument 'modle'; did you mean 'model'"),
        ({"top_k": 0}, r"top_k: found 0, expected at least 1"),
        ({"top_k": "many"}, r"field 'top_k': found 'many', expected a whole number"),
        ({"languages": ["en"]}, "holds fa, ko"),
    ],
)
def test_mistakes_in_python_are_user_errors(tiny_encoder, collections, tmp_path, options, message):
    options = {
        "model": tiny_encoder,
        "languages": ["ko"],
        "collection": collections,
        "output": tmp_path / "o",
    } | options
    with pytest.raises(UserError, match=message) as error:
        evaluate(**options)
    assert "--" not in str(error.value)
    assert not (tmp_path / "o").exists()
