import pytest

from clpl_moe.ablate.options import AblateArguments
from clpl_moe.ablate.plan import make_plan
from clpl_moe.common.cli import parse
from clpl_moe.common.errors import UserError
from clpl_moe.common.yaml_files import as_text, load_yaml, write_yaml
from helpers.ablation import TRAIN, make_collection, plan


def test_rows_times_languages_times_seeds_and_negatives_once_per_kind(configuration, tmp_path):
    make_collection(tmp_path / "data", "fa")
    languages = {name: {"collection": str(tmp_path / "data")} for name in ("ko", "fa")}
    rows = configuration["rows"] | {"random": {"mine": {"sampling": "corpus"}}}
    found = plan(configuration, languages=languages, rows=rows)
    assert [str(run) for run in found.runs if run.collection.language == "fa"] == [
        "base fa",
        "dense fa seed 1",
        "dense fa seed 2",
        "experts fa seed 1",
        "random fa seed 1",
        "random fa seed 2",
    ]
    assert len(found.minings) == 4  # two kinds, two languages
    assert len({run.folder for run in found.runs}) == len(found.runs) == 12
    assert found.labels == {"base": "Base model", "dense": "dense", "experts": "experts", "random": "random"}


def test_rows_with_training_files_of_their_own_are_not_mined_for(configuration, tmp_path):
    (tmp_path / "own.jsonl").write_text("")
    rows = {"own": {"train": {"train_data": [str(tmp_path / "own.jsonl")]}}}
    found = plan(configuration, rows=rows)
    assert found.minings == []
    assert found.runs[0].mined is None
    assert len(plan(configuration, rows=rows | {"mined": {}}).minings) == 1


def test_placeholders_stand_as_they_are(configuration, tmp_path):
    values = {
        "train_data": ["{train_data}"],
        "ance_collection": "{collection}",
        "ance_positive_queries": "{collection}/{language}/positive_queries.jsonl",
    }
    train = TRAIN | values | {"ance_refresh": "1", "ance_language": "{language}"}
    (_, run, *_) = plan(configuration, train=train).runs
    assert {name: run.decisive.values[f"train.{name}"] for name in values} == values
    assert run.decisive.values["train.tokenizer_name"] is None


def test_options_of_a_language_and_of_a_row_go_before_the_shared_ones(configuration):
    languages = {"ko": configuration["languages"]["ko"] | {"train": {"max_steps": 5, "learning_rate": 1e-4}}}
    _, dense, _, experts = plan(configuration, languages=languages).runs
    assert (dense.train["max_steps"], dense.train["learning_rate"]) == (5, 1e-4)
    assert (experts.train["max_steps"], experts.train["learning_rate"]) == (5, 1e-3)
    assert dense.train["per_device_train_batch_size"] == 2


def test_text_that_looks_like_a_number_stays_as_it_is(configuration, tmp_path):
    """Such as a commit, in the plan and in the file that a run's command reads."""
    rows = "rows: {a: {label: 1.10, train: {query_instruction_for_retrieval: 12345e6}, mine: {query_prompt: 0123456}}}"
    write_yaml(tmp_path / "c.yaml", {name: value for name, value in configuration.items() if name != "rows"})
    with (tmp_path / "c.yaml").open("a") as file:
        file.write(rows)
    found = make_plan(*parse([AblateArguments], "clpl_moe.ablate", "", ["--config", str(tmp_path / "c.yaml")]))
    assert found.labels == {"a": "1.10"}
    run = found.runs[0]
    assert run.decisive.values["train.query_instruction_for_retrieval"] == "12345e6"
    assert run.mined.decisive.values["mine.query_prompt"] == "0123456"
    write_yaml(tmp_path / "run.yaml", run.train)
    assert as_text(load_yaml(tmp_path / "run.yaml")["query_instruction_for_retrieval"]) == "12345e6"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": {"a": {"train": {"penalty_wieght": 0}}}}, "rows: 'a', language 'ko': train: unknown option 'penalty_wieght'; did you mean 'penalty_weight'"),
        ({"rows": {"a": {"train": {"top_k": 3}}}}, "rows: 'a', language 'ko': train: top_k is 3 but there are 2 experts"),
        ({"rows": {"a": {"mine": {"rank_from": 0}}}}, "rows: 'a', language 'ko': mine: rank_from: found 0"),
        ({"rows": {"a": {"trane": {}}}}, "rows: 'a': unknown entry 'trane', expected some of label, mine, seeds, train"),
        ({"rows": {"a/b": {}}}, "rows: 'a/b': expected a name"),
        ({"rows": {"a": {"seeds": [-1]}}}, "seeds: found [-1]"),
        ({"rows": {"a": {"train": {"output_dir": "x"}}}}, "'output_dir' is set for each run by this command"),
        ({"rows": {"a": {"mine": {"collection": "x"}}}}, "mine: 'collection' is set for each run by this command"),
        ({"evaluate": {"model": "x"}}, "evaluate: 'model' is set for each run by this command"),
        ({"prepare": {"output": "x"}, "languages": {"ko": {"squad": "x"}}}, "prepare: 'output' is set for each run"),
        ({"train": TRAIN | {"token": "hf_x"}}, "'token' would stand in the results; export HF_TOKEN"),
        ({"rows": "x"}, "rows: found 'x', expected a mapping"),
        ({"rows": "[" * 3000 + "]" * 3000}, "expected a mapping"),
        ({"languages": {"ko": {}}}, "languages: 'ko': expected either `collection`, a folder, or `squad`"),
        ({"languages": {"ko": {"squad": ["nothing.json"]}}}, "nothing.json: no such file"),
        ({"languages": {"ko": {"collection": "nowhere"}}}, "nowhere/ko/corpus.jsonl: no such file"),
        ({"languages": {"ko": {"collection": None}}}, "None/ko/corpus.jsonl: no such file"),
        ({"metric": "nonsense"}, "metric 'nonsense' is unknown"),
        ({"only": ["nobody"]}, "only: found 'nobody', expected some of base, dense, experts"),
        ({"parallel": 0}, "parallel: found 0"),
        ({"runs": ""}, "runs: found nothing, expected the name of an output"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_before_anything_is_written(configuration, changes, message, tmp_path):
    with pytest.raises(UserError) as error:
        plan(configuration, **changes)
    assert message in str(error.value)
    assert not (tmp_path / "runs").exists()
