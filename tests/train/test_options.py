"""The one recipe: option defaults, packaged configs, and what runs of before keep."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from clpl_moe.common.cli import parse, parse_values, read_config
from clpl_moe.common.errors import UserError
from clpl_moe.common.packaged_files import ROOT
from clpl_moe.encoder.load import load_encoder
from clpl_moe.moe.config import MoEConfig
from clpl_moe.moe.inject import inject_moe
from clpl_moe.train import all_options, train
from clpl_moe.train.base_model import add_experts
from clpl_moe.train.dry_run import plan_run
from clpl_moe.train.resume import check_output_dir, check_same_run, keep_options, resolved_config
from helpers.tiny import make_encoder
from helpers.tiny_training import arguments, make_collection, train_until, write_triplets

# What the recipe is, but for what depends on the base model.
_RECIPE = {
    **{"num_experts": 2, "top_k": 1, "moe_target": "ffn", "moe_layers": "trained", "router": "straight_through"},
    **{"trainable": "full", "frozen_layers": None, "train_group_size": 5, "queries_per_negative": 3},
    **{"query_max_len": None, "passage_max_len": None, "merge_experts": None, "merge_base_alpha": None},
    **{"penalty": "contrastive", "penalty_weight": 0.8, "in_batch_negatives": True, "mask_duplicates": True},
    **{"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_train_epochs": None},
    **{"warmup_steps": 0.1, "weight_decay": 0.01, "balance_loss_weight": 0.0},
}
_OF_BGE_M3 = {"temperature": 0.01, "learning_rate": 2e-5}
_OF_THE_SMALL_ENCODER = {"temperature": 0.005, "learning_rate": 6e-5}

# As published, and as they were before the defaults were these.
_PUBLISHED = {
    **{"num_experts": 2, "top_k": 1, "moe_target": "intermediate", "moe_layers": "all", "router": "topk_softmax"},
    **{"trainable": "moe", "frozen_layers": 0, "train_group_size": 5, "queries_per_negative": 1, "penalty": "cosine"},
    **{"query_max_len": 128, "passage_max_len": 512, "merge_experts": False, "merge_base_alpha": None},
    **{"temperature": 0.02, "penalty_weight": 0.1, "in_batch_negatives": False, "mask_duplicates": False},
    **{"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "learning_rate": 1e-5},
    **{"num_train_epochs": 2.0, "warmup_steps": 0, "weight_decay": 0.0, "bf16": False, "save_strategy": "epoch"},
    **{"penalty_temperature": None, "equal_weights": False, "symmetric_weight": 0.0, "balance_loss_weight": 0.0},
    **{"hardness_weight": 0.0, "lr_scheduler_type": "linear", "seed": 42, "max_steps": -1, "max_grad_norm": 1.0},
}


def resolved(name, **more):
    """All options of a packaged config, resolved."""
    values = read_config(ROOT / "configs" / f"{name}.yaml")[1]
    return resolved_config(
        *parse_values(all_options(), "clpl_moe.train", name, {"train_data": ["x"], "output_dir": "o"} | values | more)
    )


@pytest.mark.parametrize("name", ["ko", "fa", "hi", "ko-fa-hi", "small-encoder", "quickstart"])
def test_packaged_configs_are_the_recipe_that_the_defaults_are(name):
    small = name in ("small-encoder", "quickstart")
    expected = _RECIPE | (_OF_THE_SMALL_ENCODER if small else _OF_BGE_M3)
    if name == "quickstart":  # for its sample, whose passages are short
        expected |= {"query_max_len": 64, "passage_max_len": 160}
    found = resolved(name)
    assert {option: found.get(option) for option in expected} == expected
    defaults = {f.name: f.default for cls in all_options() for f in dataclasses.fields(cls)}
    assert {option: defaults[option] for option in _RECIPE | _OF_BGE_M3} == _RECIPE | _OF_BGE_M3


@pytest.mark.parametrize("name", ["ko", "fa", "hi"])
def test_the_published_recipe_takes_nothing_from_the_defaults(name):
    found = resolved(f"paper/{name}")
    assert {option: found.get(option) for option in _PUBLISHED} == _PUBLISHED
    written = yaml.safe_load((ROOT / "configs/paper" / f"{name}.yaml").read_text(encoding="utf-8"))
    changed = {option for option, value in _RECIPE.items() if value != _PUBLISHED[option]}
    assert changed | set(_OF_BGE_M3) <= written.keys()


@pytest.fixture
def deep(tmp_path, tiny_tokenizer):
    """Folder of an encoder of seven layers."""
    folder = tmp_path / "deep"
    make_encoder(vocab_size=len(tiny_tokenizer), num_hidden_layers=7, max_position_embeddings=130).save_pretrained(
        folder
    )
    tiny_tokenizer.save_pretrained(folder)
    return folder


_OPEN = dict.fromkeys(("frozen_layers", "merge_experts", "moe_layers", "moe_target", "trainable", "merge_base_alpha"))


@pytest.mark.parametrize(
    ("options", "frozen", "layers", "merged"),
    [
        ({}, 4, [4, 5, 6], True),
        ({"num_experts": 0}, 4, None, False),
        ({"frozen_layers": 5}, 5, [5, 6], True),
        ({"frozen_layers": 0}, 0, [0, 1, 2, 3, 4, 5, 6], True),
        ({"moe_layers": "3,6", "merge_experts": False}, 3, "3,6", False),
        ({"moe_layers": "all", "trainable": "moe"}, 0, "all", True),
        ({"trainable": "lora"}, 4, [4, 5, 6], False),
    ],
)
def test_experts_are_in_the_layers_that_are_trained(deep, tmp_path, options, frozen, layers, merged):
    data = write_triplets(tmp_path / "train.jsonl", 8)
    groups = parse(all_options(), "", "", arguments(deep, data, tmp_path / "run", **_OPEN | options))
    plan = plan_run(*groups)
    assert groups[2].frozen_layers == frozen
    assert groups[2].merge_experts is merged
    assert (plan.experts or {}).get("layers") == layers
    assert (f"embeddings and the lowest {frozen} layers frozen)" in str(plan)) is (frozen > 0)
    assert (f"to one; with experts: {tmp_path / 'run' / 'experts'}" in str(plan)) is merged


def test_of_a_base_model_with_experts_the_layers_below_them_are_frozen(deep, tmp_path):
    encoder, _ = load_encoder(deep)
    inject_moe(encoder, MoEConfig(layers=[2, 5]))
    model_args, _, training_args = parse(all_options(), "", "", arguments(deep, deep, tmp_path / "run", **_OPEN))
    add_experts(encoder, model_args, training_args)
    assert training_args.frozen_layers == 2
    assert encoder.config.moe["layers"] == [2, 5]


def test_no_layer_left_for_experts_is_refused(deep, tmp_path):
    data = write_triplets(tmp_path / "train.jsonl", 8)
    groups = parse(all_options(), "", "", arguments(deep, data, tmp_path / "run", **_OPEN | {"frozen_layers": 7}))
    with pytest.raises(UserError, match="frozen_layers: found 7, expected fewer than the encoder's 7 layers"):
        plan_run(*groups)


@pytest.mark.parametrize(("batch", "epochs", "steps"), [(1, 1, 120), (2, 2, 120), (8, 3, 45)])
def test_few_data_are_gone_through_up_to_three_times(tiny_encoder, tmp_path, batch, epochs, steps):
    data = write_triplets(tmp_path / "train.jsonl", 120)
    options = {"max_steps": None, "per_device_train_batch_size": batch}
    groups = parse(all_options(), "", "", arguments(tiny_encoder, data, tmp_path / "run", **options))
    assert plan_run(*groups).steps == steps
    assert groups[2].num_train_epochs == epochs


def test_mixtures_are_tried_where_there_is_evaluation(tiny_encoder, tmp_path):
    data = write_triplets(tmp_path / "train.jsonl", 8)
    dev = {"dev_collection": make_collection(tmp_path / "dev"), "dev_language": "ko", "save_strategy": "epoch"}
    for options, shares in (({}, []), (dev, [0.5, 0.75]), (dev | {"merge_base_alpha": 1}, [])):
        argv = arguments(tiny_encoder, data, tmp_path / "run", **{"merge_base_alpha": None} | options)
        plan = plan_run(*parse(all_options(), "", "", argv))
        assert plan.training_args.shares == shares
        assert ("alpha 0.5 or 0.75, or not at all" in str(plan)) is bool(shares)


def test_a_run_of_before_goes_on_with_the_defaults_of_then(tiny_encoder, tmp_path, caplog):
    """By the command that began it, which does not name them, and by its own config."""
    data, run = write_triplets(tmp_path / "train.jsonl", 8), tmp_path / "run"
    then = {
        **{"trainable": "moe", "moe_target": "intermediate", "moe_layers": "all", "train_group_size": 8},
        **{"queries_per_negative": 1, "temperature": 0.02, "penalty": "cosine", "penalty_weight": 0.1},
        **{"learning_rate": 5e-5, "warmup_steps": 0, "weight_decay": 0.0, "frozen_layers": 0, "merge_experts": False},
        **{"merge_base_alpha": None, "num_train_epochs": 3},
    }
    shared = {"max_steps": None, "save_strategy": "steps", "save_steps": 1}
    shared |= {"dev_collection": make_collection(tmp_path / "dev"), "dev_language": "ko"}
    train_until(arguments(tiny_encoder, data, run, **shared | then | {"merge_base_alpha": 1}), 3)
    path = run / "train_config.yaml"
    config = yaml.safe_load(path.read_text()) | {"merge_base_alpha": None}  # which was its default
    del config["frozen_cache_gb"]  # of which runs of then do not know
    path.write_text(yaml.safe_dump(config))
    again = [*arguments(tiny_encoder, data, run, **shared | dict.fromkeys(then)), "--resume_from_checkpoint", "true"]
    by_config = ["--config", str(path), "--resume_from_checkpoint", "true"]
    for argv in (again, by_config):
        groups = parse(all_options(), "", "", argv)
        check_output_dir(groups[2])
        keep_options(*groups)
        now = resolved_config(*groups)
        assert {name: now.get(name) for name in then} == then
        caplog.clear()
        check_same_run(now, groups[2].resume_from_checkpoint)
        assert not caplog.records
    # What is given goes before it, and is told, or refused.
    groups = parse(all_options(), "", "", [*again, "--penalty_weight", "0.5", "--frozen_layers", "1"])
    check_output_dir(groups[2])
    keep_options(*groups)
    assert (groups[2].penalty_weight, groups[2].frozen_layers, groups[2].penalty) == (0.5, 1, "cosine")
    result = train(config=str(path), resume_from_checkpoint="true")
    assert result.alpha in (0, 1)
    assert result.plan.steps == 12
