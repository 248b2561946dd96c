"""A model of the hub can be pinned wherever a command loads one, and what was loaded is written down."""

import json

import pytest
import yaml

from clpl_moe.common.errors import OptionError, UserError
from clpl_moe.encoder import Encoder
from clpl_moe.evaluate import evaluate
from clpl_moe.evaluate.options import EvaluateArguments
from clpl_moe.judge import judge
from clpl_moe.merge import merge
from clpl_moe.mine import mine
from clpl_moe.mine.options import MineArguments
from clpl_moe.synthesize.options import SynthesizeArguments
from clpl_moe.train import train
from clpl_moe.validate import validate
from helpers import mining
from helpers.evaluating import changed_copy, make_collection
from helpers.hub import put_into_cache
from helpers.tiny_training import write_triplets

NAME, OLD, NEW = "someone/tiny", "a" * 40, "b" * 40


@pytest.fixture
def hub(tiny_encoder, tmp_path, monkeypatch):
    """Two commits of one model; main is the later one."""
    changed = changed_copy(tiny_encoder, tmp_path / "changed")
    put_into_cache(monkeypatch, tmp_path / "hub", NAME, {OLD: tiny_encoder, NEW: changed}, main=NEW, v1=OLD)
    return {OLD: Encoder.load(tiny_encoder).fingerprint(), NEW: Encoder.load(changed).fingerprint()}


def test_encoder_of_a_revision(hub, tiny_encoder):
    assert Encoder.load(NAME).fingerprint() == hub[NEW]
    assert Encoder.load(NAME, revision=OLD).fingerprint() == Encoder.load(NAME, revision="v1").fingerprint() == hub[OLD]
    with pytest.raises(UserError, match="could be fetched from the hub at revision v9"):
        Encoder.load(NAME, revision="v9")
    with pytest.raises(OptionError, match="revision: .* is a folder here, which has none"):
        Encoder.load(tiny_encoder, revision="v1")


@pytest.mark.parametrize(("revision", "commit"), [(None, NEW), ("v1", OLD)])
def test_a_run_names_the_commit_that_it_began_with(hub, tmp_path, revision, commit):
    done = train(
        model_name_or_path=NAME,
        revision=revision,
        train_data=[str(write_triplets(tmp_path / "t.jsonl", 6))],
        output_dir=str(tmp_path / "run"),
        max_steps=1,
        per_device_train_batch_size=2,
        train_group_size=2,
        query_max_len=24,
        passage_max_len=40,
        report_to="none",
    )
    assert yaml.safe_load((tmp_path / "run" / "train_config.yaml").read_text())["revision"] == commit
    assert f"| base model | `{NAME}`, revision `{commit}` |" in (tmp_path / "run" / "README.md").read_text()
    assert f"--revision {commit}" in done.next_command()
    plan = train(config=tmp_path / "run" / "train_config.yaml", output_dir=str(tmp_path / "again"), dry_run=True)
    assert f"revision {commit}" in str(plan)


def test_evaluate_takes_one_revision_for_all_models_of_the_hub_or_one_for_each(hub, tiny_encoder, tmp_path):
    collection = make_collection(tmp_path / "data", "ko")
    options = {"collection": collection, "languages": ["ko"], "passage_max_len": 100}
    evaluate(model=[NAME], revision=["v1"], output=tmp_path / "one", **options)
    found = json.loads((tmp_path / "one" / "ko" / "metrics.json").read_text())
    assert (found["revision"], found["model_hash"]) == (OLD, hub[OLD])
    evaluate(model=[NAME, str(tiny_encoder)], output=tmp_path / "two", **options, metrics=["nDCG@10"])
    both = [json.loads(path.read_text())["revision"] for path in (tmp_path / "two").glob("*/ko/metrics.json")]
    assert sorted(both, key=str) == [None, NEW]
    given = EvaluateArguments([NAME, str(tiny_encoder)], "c", ["ko"], "o", revision=["v1"])
    assert given.revisions == {NAME: "v1", str(tiny_encoder): None}
    with pytest.raises(OptionError, match="revision: found 3, expected one, or one for each of the 2 models"):
        EvaluateArguments([NAME, str(tiny_encoder)], "c", ["ko"], "o", revision=["v1"] * 3)
    with pytest.raises(OptionError, match="revision: every model is a folder here"):
        EvaluateArguments([str(tiny_encoder)], "c", ["ko"], "o", revision=["v1"])
    with pytest.raises(OptionError, match=f"revision: found two of {NAME}, expected one"):
        EvaluateArguments([NAME, NAME], "c", ["ko"], "o", revision=["v1", "main"])
    assert EvaluateArguments([NAME, NAME], "c", ["ko"], "o", revision=["v1", "v1"]).revisions == {NAME: "v1"}


def test_mine_and_its_reranker(hub, tmp_path, monkeypatch):
    folder, asked = mining.make_collection(tmp_path), []

    class Reranker:
        def __init__(self, name, *sizes, **how):
            asked.append((name, how["revision"]))
            raise OptionError("reranker", "enough")

    monkeypatch.setattr("clpl_moe.mine.rerank.Reranker", Reranker)
    options = {"collection": folder, "language": "ko", "output": tmp_path / "out.jsonl", "model": NAME}
    with pytest.raises(OptionError, match="enough"):
        mine(**options, reranker="someone/reranker", reranker_revision="v2")
    assert asked == [("someone/reranker", "v2")]
    with pytest.raises(UserError, match="at revision v9"):
        mine(**options, revision="v9")


def test_validate_counts_the_tokens_of_a_revision(hub, tmp_path):
    data = write_triplets(tmp_path / "t.jsonl", 6)
    validate(train_data=[str(data)], tokenizer=NAME, revision="v1")
    with pytest.raises(UserError, match="nor a model that could be fetched from the hub at revision v9"):
        validate(train_data=[str(data)], tokenizer=NAME, revision="v9")
    with pytest.raises(UserError, match="revision: is for tokenizer"):
        validate(train_data=[str(data)], revision="v1")


@pytest.mark.parametrize(("options", "alpha"), [({"revision": "v1"}, 1.0), ({"base_revision": "v1"}, 0.0)])
def test_merge(hub, tmp_path, options, alpha):
    """At these shares the result is one of the two, bit for bit."""
    merge(input=NAME, base=NAME, output=tmp_path / "out", alpha=[alpha], **options)
    assert Encoder.load(tmp_path / "out").fingerprint() == hub[OLD]


def test_the_guide_of_mine_and_the_encoder_of_judge(hub, tiny_encoder, tmp_path):
    folder, data = mining.make_collection(tmp_path), write_triplets(tmp_path / "t.jsonl", 4)
    options = {"collection": folder, "language": "ko", "output": tmp_path / "out.jsonl", "model": str(tiny_encoder)}
    with pytest.raises(UserError, match="at revision v9"):
        mine(**options, guide=NAME, guide_revision="v9")
    options = {
        "train_data": [str(data)],
        "language": "ko",
        "output": tmp_path / "out.jsonl",
        "model": "m",
        "dry_run": True,
    }
    with pytest.raises(UserError, match="at revision v9"):
        judge(**options, score_model=NAME, score_revision="v9")


def test_every_command_that_loads_a_model_has_the_option(tmp_path):
    from clpl_moe.ablate.options import AblateArguments
    from clpl_moe.small_encoder.options import SmallEncoderArguments
    from clpl_moe.train.options import ModelOptions
    from clpl_moe.validate.options import ValidateArguments

    for options in (MineArguments, EvaluateArguments, SynthesizeArguments, ModelOptions, ValidateArguments):
        assert "revision" in options.__dataclass_fields__
    assert "revision" in AblateArguments.__dataclass_fields__
    assert "revision" in SmallEncoderArguments.__dataclass_fields__
