import dataclasses
import importlib.util

import pytest
import yaml

from clpl_moe.common.errors import OptionError, UserError
from clpl_moe.common.packaged_files import ROOT
from clpl_moe.train.arguments import CLPLDataArguments, CLPLModelArguments, CLPLTrainingArguments
from helpers.tiny_training import arguments, refused, write_triplets


def training(**options):
    return CLPLTrainingArguments(output_dir="out", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature is 0"),
        ({"penalty_weight": -0.1}, "penalty_weight is -0.1"),
        ({"balance_loss_weight": -1}, "balance_loss_weight: found -1, expected"),
        ({"negatives_cross_device": True, "in_batch_negatives": False}, "in_batch_negatives false forbids"),
        ({"early_stopping_patience": 2}, "early_stopping_patience needs a collection"),
        ({"eval_strategy": "steps"}, "needs a collection"),
        ({"dev_collection": "d"}, "needs dev_language"),
        ({"dev_collection": "d", "dev_language": "ko", "metric_for_best_model": "mrr"}, "choose one of ndcg@5"),
        (
            {"dev_collection": "d", "dev_language": "ko", "save_strategy": "best"},
            "needs evaluations: set eval_strategy",
        ),
        (
            {"dev_collection": "d", "dev_language": "ko", "save_strategy": "no", "early_stopping_patience": 1},
            "early_stopping_patience needs evaluations",
        ),
        ({"save_strategy": "best"}, "needs a collection"),
        ({"use_mrl": True}, "use_mrl: .* set matryoshka_dims instead"),
        ({"matryoshka_dims": [8, 8]}, "matryoshka_dims is .8, 8.: choose"),
        ({"matryoshka_dims": [0]}, "matryoshka_dims: found 0, expected at least 1"),
        ({"matryoshka_weights": [1.0]}, "give both, or neither"),
        ({"matryoshka_dims": [8], "normalize_embeddings": False}, "matryoshka_dims need normalize_embeddings"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: found 0, expected at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: found 0, expected"),
        ({"learning_rate": -1e-5}, "learning_rate: found -1e-05, expected"),
        ({"weight_decay": 1e20}, "weight_decay: found 1e.20, expected at most 1,000"),
        ({"learning_rate": float("nan")}, "learning_rate: found nan, expected"),
        ({"z_loss_weight": float("nan")}, "z_loss_weight: found nan, expected"),
        ({"dev_batch_tokens": 0}, "dev_batch_tokens: found 0, expected"),
        ({"early_stopping_patience": 0}, "early_stopping_patience: found 0, expected"),
        ({"save_steps": 0}, "save_steps is 0"),
        ({"logging_steps": -3}, "logging_steps is -3"),
        ({"num_train_epochs": 0}, "num_train_epochs is 0"),
        ({"sub_batch_size": 0}, "sub_batch_size is 0"),
        ({"seed": -1}, "seed: found -1, expected"),
        ({"seed": 2**32}, "seed: found 4294967296, expected at most 4,294,967,295"),
        ({"num_train_epochs": 1e308}, "num_train_epochs: found 1e.308, expected at most 1,000,000"),
        ({"warmup_steps": float("inf")}, "warmup_steps: found inf, expected at most"),
        ({"neftune_noise_alpha": 0.0}, "neftune_noise_alpha is 0.0, and has no effect"),
        ({"dataloader_prefetch_factor": 0}, "dataloader_prefetch_factor: found 0, expected at least 1"),
        ({"dataloader_num_workers": 100_000}, "dataloader_num_workers: found 100000, expected at most 256"),
        ({"max_steps": 10**18}, "max_steps: found 1000000000000000000, expected at most"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers: found -1, expected"),
        ({"auto_find_batch_size": True}, "no effect in this training: lower per_device_train_batch_size"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1, and has no effect"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha is 5.0, and has no effect"),
        (
            {"torch_compile": True, "torch_compile_mode": "fast"},
            "torch_compile_mode is 'fast': choose one of default, (?!default)",
        ),
        ({"torch_compile_mode": ""}, "torch_compile_mode is '': choose one of default, "),
        ({"torch_compile_backend": "none"}, "torch_compile_backend is 'none': choose one of "),
        ({"ance_margin": 0.1}, "ance_margin: goes with ance_refresh, which is not set"),
        ({"ance_language": "ko"}, "ance_language: goes with ance_refresh, which is not set"),
        ({"dev_split": "test"}, "dev_split: goes with dev_collection, which is not set"),
        ({"frozen_cache_gb": -1}, "frozen_cache_gb: found -1, expected at least 0"),
        ({"frozen_cache_gb": 1.0, "packing": False}, "frozen_cache_gb is for packed batches: set packing to true"),
        *(
            ({"frozen_cache_gb": 1.0, name: value}, f"frozen_cache_gb and {name}: .*; leave out one of the two")
            for name, value in (
                ("unified_finetuning", True),
                ("sub_batch_size", 2),
                ("fsdp", "full_shard"),
                ("deepspeed", {"zero_optimization": {}}),
                ("torch_compile", True),
            )
        ),
        ({"use_self_distill": True}, "use_self_distill: goes with unified_finetuning, which is not set"),
    ],
)
def test_training_options_that_do_not_fit(options, message):
    with pytest.raises((ValueError, OptionError), match=message):
        training(**options)
    with pytest.raises(ValueError, match="output_dir is missing"):
        CLPLTrainingArguments()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_data": None}, "train_data is missing"),
        ({"train_data": []}, "train_data is missing"),
        ({"train_group_size": 0}, "train_group_size: found 0, expected"),
        ({"passage_max_len": 2}, "passage_max_len: found 2, expected"),
        ({"queries_per_negative": -1}, "queries_per_negative: found -1, expected"),
        ({"query_instruction_format": "{}"}, "expected two places"),
        ({"query_instruction_format": "{}{}{x}"}, "expected two places"),
        ({"query_instruction_format": "{}{}{"}, "expected two places"),
        ({"passage_instruction_format": "{0}{1}"}, "expected two places"),
        ({"passage_instruction_format": "{:d}{}"}, "expected two places"),
        ({"passage_instruction_format": "{!r}{}"}, "expected two places"),
        ({"train_group_size": 2**31}, "train_group_size: found 2147483648, expected at most 4,096"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of: found 0, expected"),
        ({"max_example_num_per_dataset": 0}, "max_example_num_per_dataset: found 0, expected"),
        ({"shuffle_ratio": -1}, "shuffle_ratio: found -1, expected"),
        ({"small_threshold": 5}, "small_threshold: goes with same_dataset_within_batch, which is not set"),
    ],
)
def test_data_options_that_do_not_fit(options, message):
    with pytest.raises((ValueError, OptionError), match=message):
        CLPLDataArguments(**{"train_data": ["t"]} | options)


@pytest.mark.parametrize("name", ["accelerator_config", "fsdp_config", "deepspeed"])
def test_what_is_no_file_of_options_is_told(tmp_path, name):
    """Of a named pipe transformers would wait for the content."""
    with pytest.raises(UserError, match=f"{tmp_path}: not a file"):
        training(**{name: str(tmp_path)})


def test_a_run_that_resumes_skips_what_its_epoch_had():
    """With transformers' ignore_data_skip it would have some examples twice, and others never."""
    given = training(ignore_data_skip=True)
    assert given.without_effect == ["ignore_data_skip"]
    assert not given.ignore_data_skip


def test_model_options():
    assert CLPLModelArguments(model_name_or_path="m", revision="").hub["revision"] is None
    assert CLPLModelArguments(model_name_or_path="m", num_experts=0).moe_config() is None
    config = CLPLModelArguments(model_name_or_path="m", num_experts=4, top_k=2, moe_layers="every:2").moe_config()
    assert (config.num_experts, config.top_k, config.layers) == (4, 2, "every:2")
    with pytest.raises(ValueError, match="top_k"):
        CLPLModelArguments(model_name_or_path="m", top_k=3)
    with pytest.raises(ValueError, match="config_name has no effect"):
        CLPLModelArguments(model_name_or_path="m", config_name="n")


@pytest.mark.parametrize("router", ["given", "random"])
def test_one_expert_a_text_is_all_that_some_routers_have(router):
    CLPLModelArguments("model", router=router)
    with pytest.raises(OptionError, match=f"top_k: found 2, expected 1 with router {router}"):
        CLPLModelArguments("model", router=router, top_k=2)


def test_evaluation_follows_saving():
    args = training(dev_collection="d", dev_language="ko", save_strategy="steps", save_steps=7)
    assert (args.eval_strategy.value, args.eval_steps) == ("steps", 7)
    assert args.load_best_model_at_end
    assert args.greater_is_better


@pytest.mark.parametrize("dry_run", [False, True])
def test_lengths_beyond_the_positions_of_the_encoder(tiny_encoder, tmp_path, capsys, dry_run):
    """The first text that is so long would end the run, in an IndexError."""
    data = write_triplets(tmp_path / "t.jsonl", 4)
    for options, message in (
        ({"passage_max_len": 129}, f"--passage_max_len: found 129 tokens, {tiny_encoder} takes 128 at most"),
        ({"query_max_len": 512}, "--query_max_len: found 512 tokens"),
    ):
        assert message in refused(arguments(tiny_encoder, data, tmp_path / "a", dry_run=dry_run, **options), capsys)
    assert not (tmp_path / "a").exists()


def test_options_that_the_trainer_refuses_end_in_a_message(tiny_encoder, tmp_path, capsys):
    data = write_triplets(tmp_path / "t.jsonl", 4)
    err = refused(arguments(tiny_encoder, data, tmp_path / "a", report_to="no_such_tracker"), capsys)
    assert "error: no_such_tracker is not supported" in err


@pytest.mark.parametrize("optim", ["galore_adamw", "apollo_adamw", "lomo"])
def test_an_optimizer_whose_package_is_missing_ends_in_a_message(tiny_encoder, tmp_path, capsys, optim):
    if importlib.util.find_spec(
        {"galore_adamw": "galore_torch", "apollo_adamw": "apollo_torch"}.get(optim, "lomo_optim")
    ):
        pytest.skip("the package is there")
    data = write_triplets(tmp_path / "t.jsonl", 4)
    argv = arguments(tiny_encoder, data, tmp_path / "a", optim=optim, optim_target_modules="all-linear", dry_run=True)
    assert f"error: optimizer {optim}" in refused(argv, capsys)


def test_the_loss_has_the_options_of_training():
    given = {"temperature": 0.5, "penalty_weight": 0.25, "penalty": "contrastive", "symmetric_weight": 2.0}
    given |= {"in_batch_negatives": True, "false_negative_margin": 0.125, "same_tower_negatives": True}
    given |= {"penalty_temperature": 0.5, "hardness_weight": 3.0, "equal_weights": True}
    given |= {"matryoshka_dims": None, "matryoshka_weights": None}
    options = training(**given, negatives_cross_device=True, normalize_embeddings=False, use_cpu=True).loss_options()
    assert dataclasses.asdict(options) == given | {"normalize": False, "gather_across_devices": True}
    given |= {"matryoshka_dims": [32, 8], "matryoshka_weights": [1.0, 0.5]}
    assert dataclasses.asdict(training(**given, use_cpu=True).loss_options()).items() >= given.items()


def test_the_config_for_three_languages_is_the_one_for_each():
    """But for what names the languages, and batches of one of them."""
    three, one = (yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text()) for name in ("ko-fa-hi", "ko"))
    other = {name for name in three.keys() | one.keys() if three.get(name) != one.get(name)}
    assert other == {"train_data", "dev_language", "output_dir", "same_dataset_within_batch"}
    assert three["dev_language"] == ["ko", "fa", "hi"]
    assert three["train_data"] == [f"data/samples/{language}/train.jsonl" for language in three["dev_language"]]
