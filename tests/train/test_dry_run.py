import re
import shutil

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from clpl_moe import Encoder
from clpl_moe.common.cli import parse
from clpl_moe.common.files import write_jsonl
from clpl_moe.train.__main__ import main
from clpl_moe.train.arguments import CLPLDataArguments, CLPLModelArguments, CLPLTrainingArguments
from clpl_moe.train.dry_run import plan_run
from helpers.tiny import make_encoder
from helpers.tiny_training import (
    arguments,
    make_collection,
    make_runner,
    make_triplets,
    read_metrics,
    refused,
    write_triplets,
)


def plan(argv):
    return plan_run(*parse([CLPLModelArguments, CLPLDataArguments, CLPLTrainingArguments], "", "", argv))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_triplets(tmp_path_factory.mktemp("data") / "train.jsonl", 11)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 2},
        {"max_steps": -1, "num_train_epochs": 3, "dataloader_drop_last": True},
        {"num_experts": 3, "top_k": 2, "moe_target": "ffn", "trainable": "ffn"},
        {"num_experts": 0, "trainable": "full"},
        {"num_experts": 0, "trainable": "lora", "lora_rank": 3},
        {"trainable": "lora", "lora_targets": "experts"},
        {"frozen_layers": 1},
        {
            "max_steps": -1,
            "num_train_epochs": 1,
            "same_dataset_within_batch": True,
            "small_threshold": 0,
            "per_device_train_batch_size": 5,
        },
    ],
)
def test_figures_are_those_of_the_run(tiny_encoder, data, tmp_path, options):
    files = [data, write_triplets(tmp_path / "b.jsonl", 4)]
    argv = arguments(tiny_encoder, files, tmp_path / "run", **options)
    planned, runner = plan(argv), make_runner(argv)
    assert planned.examples == 15
    parameters = [p for name, p in runner.model.model.named_parameters() if "pooler" not in name]
    assert planned.parameters == sum(p.numel() for p in parameters)
    assert planned.trained_parameters == sum(p.numel() for p in parameters if p.requires_grad)
    runner.run()
    assert planned.steps == runner.trainer.state.global_step


def test_tokens(tiny_encoder, tiny_tokenizer, data, tmp_path):
    argv = arguments(tiny_encoder, data, tmp_path / "run", queries_per_negative=0, gradient_accumulation_steps=3)
    runner, tokens = make_runner(argv), 0
    for index in range(11):
        batch = runner.trainer.data_collator([runner.data.dataset[(0, index)]])
        tokens += len(batch["texts"].input_ids)
    assert plan(argv).estimate.tokens_per_step == pytest.approx(tokens / 11 * 6, abs=1)


def test_tokens_are_those_of_the_tokenizer_that_is_named(tiny_encoder, data, tmp_path):
    """Its base model has another one: of words, where the named one is of characters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<pad>": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model = shutil.copytree(tiny_encoder, tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<pad>").save_pretrained(model)
    named = plan(arguments(model, data, tmp_path / "run", tokenizer_name=tiny_encoder))
    assert named.estimate == plan(arguments(tiny_encoder, data, tmp_path / "run")).estimate
    assert named.estimate != plan(arguments(model, data, tmp_path / "run")).estimate


def test_dry_run_prints_the_plan_and_writes_nothing(tiny_encoder, data, tmp_path, capsys, monkeypatch):
    """And loads no weights: the folder's may as well not be there."""
    model = shutil.copytree(tiny_encoder, tmp_path / "model")
    (model / "model.safetensors").unlink()
    dev = make_collection(tmp_path / "dev")
    argv = arguments(model, data, tmp_path / "run", dev_collection=dev, dev_language="ko")
    main([*argv, "--dry_run", "true"])
    out = capsys.readouterr().out
    for line in (
        "examples        11 in 1 file(s)",
        "steps           4",
        "experts ",
        "12 queries, 12 passages",
        "memory ",
    ):
        assert line in out
    assert not (tmp_path / "run").exists()


@pytest.fixture
def electra(tiny_tokenizer, tmp_path):
    """The folder of an encoder that can have no experts."""
    make_encoder("electra", vocab_size=len(tiny_tokenizer), max_position_embeddings=130).save_pretrained(tmp_path / "e")
    tiny_tokenizer.save_pretrained(tmp_path / "e")
    return tmp_path / "e"


def test_dry_run_stops_where_the_run_would(tiny_encoder, electra, data, tmp_path, capsys):
    (tmp_path / "untyped").mkdir()
    (tmp_path / "untyped" / "config.json").write_text("{}")
    for options, message in [
        ({"dev_collection": tmp_path / "nowhere", "dev_language": "ko"}, "nowhere"),
        ({"num_experts": 0}, "trainable is moe but the model has no experts"),
        ({"moe_layers": "7"}, "7"),
        ({"frozen_layers": 2}, "frozen_layers, leaves no parameters"),
        ({"model_name_or_path": tmp_path / "nomodel"}, "nomodel"),
        ({"model_name_or_path": tmp_path / "untyped"}, "untyped"),
        ({"model_name_or_path": electra}, "num_experts: found 2 and a ElectraModel, expected 0"),
        ({"router": "given"}, "experts_of_data: found none"),
        ({"router": "given", "experts_of_data": 2}, "experts_of_data: expert is 2: choose a number from 0 to 1"),
        ({"router": "given", "experts_of_data": 1, "weight_decay": 0.1}, "weight_decay: changes experts"),
        ({"router": "given", "experts_of_data": 1, "packing": False}, "experts_of_data: found padded batches"),
        ({"dev_expert": 0}, "dev_expert: the encoder has no experts with router given"),
        ({"trainable": "lora", "merge_experts": True, "merge_adapter": True}, "merge_adapter: found true"),
    ]:
        for dry_run in (True, False):
            argv = arguments(tiny_encoder, data, tmp_path / "run", dry_run=dry_run, **options)
            with pytest.raises(SystemExit) as stop:
                main(argv)
            assert stop.value.code == 2, (options, dry_run)
            assert message in capsys.readouterr().err
            assert not (tmp_path / "run").exists()


def test_an_adapter_has_the_shape_of_its_base_model(electra, data, tmp_path):
    adapted = Encoder.load(electra)
    inject_adapter_in_model(LoraConfig(target_modules=["query"]), adapted.model)
    adapted.save(tmp_path / "adapter")
    plans = [
        plan(arguments(model, data, tmp_path / "run", num_experts=0, trainable="full"))
        for model in (tmp_path / "adapter", electra)
    ]
    assert plans[0].parameters == plans[1].parameters


@pytest.mark.slow
def test_an_encoder_without_experts_is_trained(electra, data, tmp_path):
    options = {"num_experts": 0, "trainable": "full", "frozen_layers": None, "max_steps": 1}
    argv = arguments(electra, data, tmp_path / "run", merge_experts=None, merge_base_alpha=0.5, **options)
    assert plan(argv).trained_parameters == make_runner(argv).plan.trained_parameters
    main(argv)
    before, after = (Encoder.load(folder).model.state_dict() for folder in (electra, tmp_path / "run"))
    changed = {name for name, tensor in before.items() if not tensor.equal(after[name])}
    assert changed
    assert all(name.startswith("encoder.layer.1.") for name in changed)


def test_published_base_model_out_of_reach(data, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    planned = plan(arguments("BAAI/bge-m3", data, tmp_path / "run", bf16=True))
    with torch.device("meta"):
        from transformers import XLMRobertaConfig, XLMRobertaModel

        config = XLMRobertaConfig(
            vocab_size=250002, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
            max_position_embeddings=8194, type_vocab_size=1,
        )  # fmt: skip
        dense = sum(p.numel() for p in XLMRobertaModel(config, add_pooling_layer=False).parameters())
    expert = 1024 * 4096 + 4096
    assert planned.parameters == dense + 24 * (expert + 2 * 1024)
    assert planned.trained_parameters == 24 * (2 * expert + 2 * 1024)
    # Weights in float32, and gradients and two moments of what is trained.
    assert planned.estimate.state_bytes == 4 * planned.parameters + 12 * planned.trained_parameters


def test_checkpointing_lowers_the_memory(tiny_encoder, data, tmp_path):
    argv = arguments(tiny_encoder, data, tmp_path / "run")
    bytes_ = [plan([*argv, "--gradient_checkpointing", value]).estimate.activation_bytes for value in ("false", "true")]
    assert bytes_[1] < bytes_[0]


def test_gradient_caching_lowers_the_memory_of_a_large_batch_to_that_of_a_chunk(tiny_encoder, data, tmp_path):
    argv = [*arguments(tiny_encoder, data, tmp_path / "run"), "--grad_cache_tokens", "50"]
    batches = [plan([*argv, "--per_device_train_batch_size", size]).estimate.activation_bytes for size in ("2", "200")]
    assert batches[0] == batches[1]
    assert plan(arguments(tiny_encoder, data, tmp_path / "run")).estimate.activation_bytes > 2 * batches[0]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    lines = [{"query": line["query"], "pos": line["pos"]} for line in make_triplets(8)]
    path = tmp_path_factory.mktemp("pairs") / "pairs_no_in_batch_neg.jsonl"
    write_jsonl(path, lines)
    write_jsonl(path.with_name("pairs.jsonl"), lines)
    return path.with_name("pairs.jsonl")


def test_pairs_train_on_in_batch_negatives(tiny_encoder, pairs, tmp_path, capsys):
    argv = arguments(tiny_encoder, pairs, tmp_path / "run")
    main([*argv, "--dry_run", "true"])
    out = capsys.readouterr().out
    assert "8 in 1 file(s), 8 of them pairs without negatives" in out
    assert "1 passages a query" in out
    main(argv)
    assert [m["loss"] > 0.01 for m in read_metrics(tmp_path / "run") if "loss" in m] == [True] * 4


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "pairs",
            {"per_device_train_batch_size": 1},
            "the lines of train_data have no 'neg', and a batch has 1 of 8 queries",
        ),
        (
            "triplets",
            {"per_device_train_batch_size": 1, "train_group_size": 1},
            "train_group_size is 1, and a batch has 1",
        ),
        ("pairs", {"in_batch_negatives": False}, "have no 'neg', and in-batch negatives are off"),
        ("pairs_no_in_batch_neg", {}, "have no 'neg', and in-batch negatives are off"),
        (
            "pairs",
            {"per_device_train_batch_size": 1, "same_dataset_within_batch": True, "small_threshold": 0},
            "have no 'neg', and a batch has 1 of 8 queries",
        ),
    ],
)
def test_nothing_to_contrast_is_refused(tiny_encoder, data, pairs, tmp_path, capsys, dry_run, name, options, message):
    path = data if name == "triplets" else pairs.with_name(f"{name}.jsonl")
    assert message in refused(arguments(tiny_encoder, path, tmp_path / "run", dry_run=dry_run, **options), capsys)
    assert not (tmp_path / "run").exists()


ONE_QUERY = [{"query": ("one?", "One ?")[i % 2], "pos": [f"answer {i}"]} for i in range(6)]
ONE_POSITIVE = [{"query": f"q{i}", "pos": [("the answer", "The  answer!")[i % 2]]} for i in range(6)]
ALL_KNOWN = [{"query": "one?", "pos": [f"answer {i}"], "neg": [f"answer {5 - i}"]} for i in range(6)]


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        (ONE_QUERY, {}, "in all 6 lines there are 1 query and 6 positives, each of which answers each query"),
        (ONE_POSITIVE, {}, "in all 6 lines there are 6 queries and 1 positive, each of which answers each query"),
        (ONE_POSITIVE, {"mask_duplicates": False}, "6 queries and 1 positive"),
        (ONE_QUERY[:2] * 2 + [{"query": "one?", "pos": ["answer 0"], "neg": []}], {}, "1 query and 2 positives"),
        (ALL_KNOWN, {}, "each 'neg' of train_data is known to answer its query, and in all 6 lines there are 1 query"),
        (
            ALL_KNOWN,
            {"in_batch_negatives": False},
            "each 'neg' of train_data is known to answer its query, and in-batch",
        ),
        (ALL_KNOWN, {"train_group_size": 1}, "train_group_size is 1, and in all 6 lines there are 1 query"),
    ],
)
def test_lines_that_answer_each_other_are_nothing_to_contrast(
    tiny_encoder, tmp_path, capsys, dry_run, lines, options, message
):
    write_jsonl(tmp_path / "t.jsonl", lines)
    argv = arguments(tiny_encoder, tmp_path / "t.jsonl", tmp_path / "run", dry_run=dry_run, **options)
    assert message in refused(argv, capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("lines", "options"),
    [
        ([*ONE_QUERY, {"query": "other", "pos": ["another"]}], {}),
        ([*ONE_POSITIVE, {"query": "q0", "pos": ["another"]}], {}),
        ([*ONE_QUERY, {"query": "one?", "pos": ["x"], "neg": ["no answer"]}], {}),
        (ONE_QUERY, {"mask_duplicates": False}),  # as the files say
    ],
)
def test_one_negative_is_something_to_contrast(tiny_encoder, tmp_path, lines, options):
    write_jsonl(tmp_path / "t.jsonl", lines)
    assert plan(arguments(tiny_encoder, tmp_path / "t.jsonl", tmp_path / "run", **options)).examples == len(lines)


def test_of_data_that_stay_apart_each_needs_something_to_contrast(tiny_encoder, data, tmp_path, capsys):
    write_jsonl(tmp_path / "t.jsonl", ONE_QUERY)
    argv = arguments(tiny_encoder, [data, tmp_path / "t.jsonl"], tmp_path / "run", dry_run=True)
    main(argv)
    assert "1 query and 6 positives" in refused([*argv, "--same_dataset_within_batch", "true"], capsys)


def test_the_plan_says_where_batches_cannot_be_distinct(tiny_encoder, tmp_path, capsys):
    lines = make_triplets(12)
    for line in lines[:9]:
        line["pos"] = lines[0]["pos"]
    write_jsonl(tmp_path / "t.jsonl", lines)
    argv = arguments(tiny_encoder, tmp_path / "t.jsonl", tmp_path / "run", dry_run=True, per_device_train_batch_size=3)
    main(argv)
    assert "distinct " not in capsys.readouterr().out
    main([*argv, "--distinct_batches", "true"])
    (found,) = re.findall("distinct +(.*)\n", capsys.readouterr().out)
    expected = "batches have examples near each other: 9 examples have one text or near copies of it, more than there are batches"
    assert found in {f"{count} of 4 {expected}" for count in (3, 4)}
    write_triplets(tmp_path / "t.jsonl", 12)
    main([*argv, "--distinct_batches", "true"])
    assert "distinct        no batch of 4 has two examples near each other\n" in capsys.readouterr().out


@pytest.mark.parametrize(("instruction", "warned"), [(None, True), ("find: ", False)])
@pytest.mark.parametrize("dry_run", [True, False])
def test_prompts_without_effect_are_told_once_with_their_number(
    tiny_encoder, tmp_path, caplog, dry_run, instruction, warned
):
    lines = make_triplets(6)
    for line in lines[:4]:
        line["prompt"] = "own: "
    write_jsonl(tmp_path / "t.jsonl", lines)
    options = {} if instruction is None else {"query_instruction_for_retrieval": instruction}
    main(arguments(tiny_encoder, tmp_path / "t.jsonl", tmp_path / "run", max_steps=1, dry_run=dry_run, **options))
    found = [record.getMessage() for record in caplog.records if "'prompt'" in record.getMessage()]
    assert [message.startswith("4 of 6 examples have a 'prompt', which has no effect") for message in found] == [
        True
    ] * warned
