import json

import pytest

from clpl_moe.common.files import write_json
from helpers.ablation import TRAIN, finish, keys, plan


def test_a_run_is_known_by_what_decides_its_result(configuration, tmp_path):
    before = keys(configuration)
    # Neither names, places, order, nor defaults that are written out.
    renamed = {"a": {"train": False}, "b": {"train": {"trainable": "full", "num_experts": 0, "temperature": 0.01}}}
    assert keys(configuration, rows=renamed, output=str(tmp_path / "x.json"), parallel=2) == before[:3]
    # But options of every part, and the content of model and data.
    assert set(keys(configuration, train=TRAIN | {"temperature": 0.03})).isdisjoint(before[1:])
    assert set(keys(configuration, mine=configuration["mine"] | {"rank_from": 1})).isdisjoint(before[1:])
    assert set(keys(configuration, evaluate=configuration["evaluate"] | {"top_k": 9})).isdisjoint(before)
    with (tmp_path / "data" / "ko" / "dev_qrels.jsonl").open("a") as file:
        file.write('{"qid": "dev12", "docid": "p13", "relevance": 1}\n')
    assert set(keys(configuration)).isdisjoint(before)


@pytest.mark.parametrize(
    "option", ["train_data", "tokenizer_name", "dev_collection", "ance_collection", "ance_positive_queries"]
)
def test_a_run_is_known_by_what_its_paths_hold_and_not_by_their_names(configuration, tmp_path, option):
    folder = option in ("tokenizer_name", "dev_collection", "ance_collection")
    path = tmp_path / "ko-source"
    (path / "ko" if folder else tmp_path).mkdir(parents=True, exist_ok=True)
    file = path / "ko" / "file" if folder else path
    file.write_text("one")
    values = TRAIN | {
        "dev_collection": {"dev_language": "{language}"},
        "ance_collection": {"ance_refresh": "1", "ance_language": "{language}"},
        "ance_positive_queries": {"ance_refresh": "1", "ance_language": "ko", "ance_collection": "{collection}"},
    }.get(option, {})

    def of(name):
        value = ["{train_data}", name] if option == "train_data" else name
        (_, run, *_) = plan(configuration, train=values | {option: value}).runs
        return run.decisive

    before = of(str(path))
    moved = path.rename(tmp_path / "ko-moved")
    assert of(str(moved)).key == of(str(tmp_path / "{language}-moved")).key == before.key
    (moved / "ko" / "file" if folder else moved).write_text("two")
    assert of(str(moved)).key != before.key
    assert of("someone/theirs").values[f"train.{option}"] in ("someone/theirs", ["{train_data}", "someone/theirs"])


@pytest.mark.parametrize("option", ["guide", "reranker"])
def test_negatives_are_known_by_what_a_model_beside_the_base_holds(configuration, tmp_path, option):
    folder = tmp_path / "judge"
    folder.mkdir()
    (folder / "model.safetensors").write_text("one")

    def of(name):
        (mining,) = plan(configuration, mine=configuration["mine"] | {option: name}).minings
        return mining.decisive

    before = of(str(folder))
    moved = folder.rename(tmp_path / "moved")
    assert of(str(moved)).key == before.key
    (moved / "model.safetensors").write_text("two")
    assert of(str(moved)).key != before.key
    assert of("someone/theirs").values[f"mine.{option}"] == "someone/theirs"


def test_a_row_that_was_renamed_keeps_its_run(configuration):
    run = plan(configuration).runs[1]
    finish(run, 0.5)
    rows = {"base": {"train": False}, "other": configuration["rows"]["dense"]}
    again = plan(configuration, rows=rows).runs[1]
    assert again.row == "other"
    assert again.folder == run.folder
    assert again.metric("nDCG@5") == 0.5


def test_an_option_that_is_new_makes_no_other_run_and_a_default_that_changed_does(configuration):
    run = plan(configuration).runs[1]
    finish(run, 0.5)
    path = run.folder / "options.json"
    options = json.loads(path.read_text(encoding="utf-8"))
    assert options["train.temperature"] == 0.01
    write_json(path, {k: v for k, v in options.items() if k != "train.temperature"})
    assert plan(configuration).runs[1].folder == run.folder
    assert plan(configuration, train=TRAIN | {"temperature": 0.1}).runs[1].folder != run.folder
    path = run.folder.rename(run.folder.parent / "earlier") / path.name
    assert plan(configuration).runs[1].folder.name == "earlier"
    write_json(path, options | {"train.temperature": 0.03})
    assert plan(configuration).runs[1].result() is None
