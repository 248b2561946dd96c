import json

import pytest

from clpl_moe.ablate.options import AblateArguments
from clpl_moe.ablate.results import markdown, question, summarize, table_rows
from clpl_moe.common.errors import UserError
from clpl_moe.common.files import write_json
from helpers.ablation import finish, make_collection, plan


def test_table_has_mean_spread_and_error_relative_to_the_first_row(configuration, tmp_path):
    make_collection(tmp_path / "data", "fa")
    configuration["languages"] = {name: {"collection": str(tmp_path / "data")} for name in ("ko", "fa")}
    found = plan(configuration)
    values = {
        "base": {"ko": [0.8], "fa": [0.6]},
        "dense": {"ko": [0.84, 0.86], "fa": [0.7, 0.76]},
        "experts": {"ko": [0.9]},
    }
    for row, of_row in values.items():
        for language, of_language in of_row.items():
            runs = [run for run in found.runs if run.row == row and run.collection.language == language]
            for run, value in zip(runs, of_language, strict=True):
                finish(run, value)
    base, dense, experts = summarize(found, "nDCG@5")
    assert base["average"]["mean"] == pytest.approx(0.7)
    assert base["average"]["spread"] is None
    assert dense["languages"]["ko"]["mean"] == pytest.approx(0.85)
    assert dense["languages"]["ko"]["spread"] == pytest.approx(0.02 / 2**0.5)
    assert dense["average"]["values"] == pytest.approx([0.77, 0.81])  # seed by seed
    assert dense["languages"]["ko"]["error_change"] == pytest.approx(-0.25)  # 0.2 to 0.15
    assert dense["average"]["error_change"] == pytest.approx(0.21 / 0.3 - 1)
    assert dense["error_change_mean"] == pytest.approx((-0.25 + 0.27 / 0.4 - 1) / 2)
    assert experts["average"]["mean"] is None  # Persian is not there yet
    lines = markdown(table_rows([base, dense, experts])).splitlines()
    assert lines[0] == "| method | seeds | ko | fa | average | error | error by language |"
    assert lines[2] == "| Base model | 1 | 0.8000 | 0.6000 | 0.7000 |  |  |"
    assert lines[3] == "| dense | 2 | 0.8500 ± 0.0141 | 0.7300 ± 0.0424 | 0.7900 ± 0.0283 | −30.0% | −25.0%, −32.5% |"
    assert lines[4] == "| experts | 0–1 | 0.9000 | – | – | – | −50.0%, – |"


def test_memory_stands_beside_the_metric_where_it_was_measured(configuration):
    found, training = plan(configuration), {"steps": 2, "seconds": 0.1, "precision": "float32"}
    for run, gib in zip(found.runs, (None, 1, 3, None), strict=True):
        finish(run, 0.5)
        if gib is not None:
            content = json.loads((run.folder / "run.json").read_text())
            write_json(run.folder / "run.json", content | {"training": training | {"peak_bytes": gib * 2**30}})
    summary = summarize(found, "nDCG@5")
    assert [row["peak_bytes"] for row in summary] == [None, 3 * 2**30, None]
    assert [row["memory"] for row in table_rows(summary)] == ["–", "3.00 GiB", "–"]


@pytest.mark.parametrize(
    "damage",
    [
        {"metrics": None},
        {"metrics": {"nDCG@5": "x"}},
        {"dtype": 3},
        {"key": []},
        {"training": {}},
        {"training": {"precision": "float32", "peak_bytes": "x"}},
    ],
)
def test_a_damaged_result_is_told_of(configuration, damage):
    run = plan(configuration).runs[1]
    finish(run, 0.5)
    content = run.result()
    write_json(run.folder / "run.json", content | damage)
    with pytest.raises(UserError, match=r"run\.json: not the result of a run; remove its folder"):
        run.metric("nDCG@5")
    for name in content:
        write_json(run.folder / "run.json", {key: value for key, value in content.items() if key != name})
        with pytest.raises(UserError, match="not the result of a run"):
            run.result()
    (run.folder / "run.json").write_text("{")
    with pytest.raises(UserError, match="not the result of a run"):
        run.result()


def test_a_damaged_record_of_a_mixture_is_told_of(configuration):
    run = plan(configuration).runs[1]
    assert run.mixture() is None
    write_json(run.folder / "model" / "merge.json", {"alpha": 0.5, "metric": "nDCG@10"})
    with pytest.raises(UserError, match=r"merge\.json: field 'candidates': missing"):
        run.mixture()


def test_names_of_rows_are_no_markup():
    table = markdown([{"method": "a | b\n| c", "ko": "0.5"}])
    assert table.splitlines()[2:] == ["| a \\| b \\| c | 0.5 |"]


def test_the_table_names_the_split_of_its_queries(configuration):
    arguments = AblateArguments(**configuration)
    assert "on the dev queries" in question(arguments)
    arguments.mappings["evaluate"] = {"split": "test"}
    assert "on the test queries" in question(arguments)
