import json
import shutil

import pytest

from clpl_moe.common.errors import UserError
from clpl_moe.common.files import write_json
from clpl_moe.evaluate import evaluate
from clpl_moe.evaluate.metrics import M3_SCORES
from clpl_moe.evaluate.tasks import model_labels, read_result
from end_to_end.kills import differences
from helpers.evaluating import changed_copy, make_collection, read_csv, run, table


def test_same_content_is_reused_wherever_it_lies(tiny_encoder, collections, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    run(tiny_encoder, collections, output)
    before = (output / "ko" / "metrics.json").read_text()
    before_table = table(capsys.readouterr().out)
    shutil.copytree(tiny_encoder, tmp_path / "moved")
    shutil.copytree(collections, tmp_path / "moved data")
    monkeypatch.setattr(
        "clpl_moe.evaluate.evaluation.evaluate_retrieval", lambda *a, **k: pytest.fail("computed again")
    )
    run(tmp_path / "moved", tmp_path / "moved data", output, batch_tokens=99)
    printed = capsys.readouterr()
    assert "not computed again" in printed.err
    assert table(printed.out)[-1] == ["moved", *before_table[-1][1:]]
    assert (output / "ko" / "metrics.json").read_text() == before


def test_results_renamed_with_their_collection_are_reused(tiny_encoder, collections, tmp_path, monkeypatch):
    output = tmp_path / "out"
    options = {"m3_scores": True, "rerank_top": 5}
    run(tiny_encoder, collections, output, **options)
    collections = collections.rename(tmp_path / "moved")
    for folder in (collections, output):
        (folder / "ko").rename(folder / "kor")
    monkeypatch.setattr(
        "clpl_moe.evaluate.evaluation.evaluate_retrieval", lambda *a, **k: pytest.fail("computed again")
    )
    monkeypatch.setattr("clpl_moe.evaluate.m3.rerank", lambda *a, **k: pytest.fail("computed again"))
    options |= {"collection": collections, "languages": ["kor"], "output": output}
    found = evaluate(model=[tiny_encoder], passage_max_len=100, dtype="float32", **options).results
    names = ("model", "language", "split", "collection")
    assert len(found) == 1 + len(M3_SCORES)
    assert {tuple(r.about[name] for name in names) for r in found} == {
        (str(tiny_encoder), "kor", "dev", str(collections))
    }
    assert {row["language"] for row in read_csv(output / "per_query.csv")} == {"kor"}


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
    assert "set overwrite to replace" in message
    assert str(output / "ko") in message
    assert (output / "ko" / "run.trec").read_text() == before
    run(model, collections, output, overwrite="true", **options)
    content = json.loads((output / "ko" / "metrics.json").read_text())
    assert content["model"] == str(model)
    if what not in ("unreadable", "run only"):
        assert (output / "ko" / "run.trec").read_text() != before


@pytest.mark.parametrize("value", ["lost", None, {"R@100": 1.0}, {"nDCG@5": "x"}])
@pytest.mark.parametrize("part", ["exact_metrics", "bytes"])
def test_a_damaged_part_is_told_of(tiny_encoder, collections, tmp_path, capsys, part, value):
    options = {"metrics": "nDCG@5", "quantize": "int8"}
    run(tiny_encoder, collections, tmp_path / "out", **options)
    path = tmp_path / "out" / "ko" / "metrics.json"
    content = json.loads(path.read_text())
    damaged = content | {part: value if part == "exact_metrics" else {"int8": value}}
    if value == "lost":
        del damaged[part]
    write_json(path, damaged)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(tiny_encoder, collections, tmp_path / "out", **options)
    assert stop.value.code == 2
    expected = "not the results of clpl_moe.evaluate; name another output, or set overwrite to replace it"
    assert capsys.readouterr().err == f"error: {path}: {expected}\n"
    run(tiny_encoder, collections, tmp_path / "out", **options, overwrite="true")
    assert json.loads(path.read_text())[part] == content[part]


def test_damaged_figures_of_an_approximate_search_are_told_of(tmp_path):
    figures = {"recall": 0.96, "k": 10, "sample": 8, "lists": 5, "lists_searched": 2, "seconds": {"index": 0.1}}
    names = dict.fromkeys(("collection", "collection_hash", "split"), "x")
    content = {"metrics": {"AP": 0.5}, **names, "settings": {"index": "approximate"}, "approximate": figures}
    write_json(tmp_path / "metrics.json", content)
    assert read_result(tmp_path / "metrics.json") == content
    damaged = [figures | {name: None} for name in figures if name != "k"]
    for found in (*damaged, None, figures | {"seconds": {"index": "x"}}):
        write_json(tmp_path / "metrics.json", content | {"approximate": found})
        with pytest.raises(UserError, match="metrics.json: not the results"):
            read_result(tmp_path / "metrics.json")


def test_the_metrics_shown_are_those_of_the_run_file(tiny_encoder, collections, tmp_path, capsys):
    output = tmp_path / "out"
    run(tiny_encoder, collections, output)
    printed = table(capsys.readouterr().out)
    content = json.loads((output / "ko" / "metrics.json").read_text())
    write_json(output / "ko" / "metrics.json", content | {"metrics": {"nDCG@5": 0.1}})
    run(tiny_encoder, collections, output)
    assert table(capsys.readouterr().out) == printed


def test_an_interrupted_overwrite_leaves_no_metrics_beside_a_run_of_something_else(
    tiny_encoder, collections, tmp_path, monkeypatch
):
    run(tiny_encoder, collections, tmp_path / "out")

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("clpl_moe.evaluate.metrics.write_trec_run", interrupted)
    with pytest.raises(SystemExit):
        run(tiny_encoder, collections, tmp_path / "out", query_prompt="x", overwrite="true")
    assert not (tmp_path / "out" / "ko" / "metrics.json").exists()


@pytest.mark.parametrize("heads", [False, True])
def test_a_stop_between_the_runs_and_their_metrics_is_no_obstacle(
    tiny_encoder, collections, tmp_path, monkeypatch, heads
):
    def interrupted(path, *args):
        if path.name == ("metrics.m3.json" if heads else "metrics.json"):
            raise KeyboardInterrupt
        return write_json(path, *args)

    options = {"m3_scores": True, "rerank_top": 5} if heads else {}
    with monkeypatch.context() as patch:
        patch.setattr("clpl_moe.evaluate.evaluation.write_json", interrupted)
        with pytest.raises(SystemExit):
            run(tiny_encoder, collections, tmp_path / "out", **options)
    assert (tmp_path / "out" / "ko" / ("run.all.trec" if heads else "run.trec")).exists()
    run(tiny_encoder, collections, tmp_path / "out", **options)
    run(tiny_encoder, collections, tmp_path / "whole", **options)
    assert not differences(tmp_path / "out", tmp_path / "whole")


def test_labels():
    assert model_labels(["runs/a", "runs/b"]) == ["a", "b"]
    assert model_labels(["x/best", "y/best", "hub/other"]) == ["x_best", "y_best", "hub_other"]
    assert model_labels(["same", "same"]) == ["same_1", "same_2"]
    assert model_labels(["/"]) == ["root"]
