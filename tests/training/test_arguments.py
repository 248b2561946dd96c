import pytest
import torch

from clpl_moe.errors import UserError
from clpl_moe.retrieval import encode
from clpl_moe.train import main
from clpl_moe.training.arguments import CLPLDataArguments, CLPLModelArguments, CLPLTrainingArguments
from tiny_training import arguments, make_runner, write_triplets


def training(**options):
    return CLPLTrainingArguments(output_dir="out", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature is 0"),
        ({"penalty_weight": -0.1}, "penalty_weight is -0.1"),
        ({"balance_loss_weight": -1}, "balance_loss_weight is -1"),
        ({"negatives_cross_device": True, "in_batch_negatives": False}, "in_batch_negatives"),
        ({"early_stopping_patience": 2}, "early_stopping_patience needs a collection"),
        ({"eval_strategy": "steps"}, "needs a collection"),
        ({"dev_collection": "d"}, "needs dev_language"),
        ({"dev_collection": "d", "dev_language": "ko", "metric_for_best_model": "mrr"}, "choose one of ndcg@5"),
        ({"use_mrl": True}, "use_mrl"),
    ],
)
def test_training_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        training(**options)
    with pytest.raises(ValueError, match="output_dir is missing"):
        CLPLTrainingArguments()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_data": None}, "train_data is missing"),
        ({"train_data": []}, "train_data is missing"),
        ({"train_group_size": 0}, "train_group_size is 0"),
        ({"passage_max_len": 2}, "passage_max_len is 2"),
        ({"queries_per_negative": -1}, "queries_per_negative is -1"),
        ({"query_instruction_format": "{}"}, "expected two places"),
    ],
)
def test_data_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        CLPLDataArguments(**{"train_data": ["t"]} | options)


def test_model_options():
    assert CLPLModelArguments(model_name_or_path="m", num_experts=0).moe_config() is None
    config = CLPLModelArguments(model_name_or_path="m", num_experts=4, top_k=2, moe_layers="every:2").moe_config()
    assert (config.num_experts, config.top_k, config.layers) == (4, 2, "every:2")
    with pytest.raises(ValueError, match="top_k"):
        CLPLModelArguments(model_name_or_path="m", top_k=3)


def test_evaluation_follows_saving():
    args = training(dev_collection="d", dev_language="ko", save_strategy="steps", save_steps=7)
    assert (args.eval_strategy.value, args.eval_steps) == ("steps", 7)
    assert args.load_best_model_at_end
    assert args.greater_is_better


@pytest.mark.parametrize("fast", [True, False])
def test_bf16_where_the_hardware_is_fast_at_it_unless_said_otherwise(monkeypatch, fast):
    monkeypatch.setattr(encode, "fast_bfloat16", lambda device: fast)
    assert training(use_cpu=True).bf16 is fast
    assert training(use_cpu=True, bf16=not fast).bf16 is not fast
    assert training(use_cpu=True, fp16=True).bf16 is False


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_processes_that_tokenise():
    """An accelerator is not to wait for the tokenizer; on a CPU, they would take it from the training."""
    assert training(use_cpu=True).dataloader_num_workers == 0
    assert training(dataloader_num_workers=3).dataloader_num_workers == 3


class TestWithoutAccelerator:
    def test_cpu_is_used(self):
        """FlagEmbedding's processes do not find each other unless use_cpu is said."""
        assert training().use_cpu

    def test_fp16_says_so_and_names_the_way_out(self, tiny_encoder, tmp_path, capsys):
        data = write_triplets(tmp_path / "t.jsonl", 4)
        argv = arguments(tiny_encoder, data, tmp_path / "out", fp16=True)
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2
        err = capsys.readouterr().err
        assert "fp16 needs a CUDA device" in err
        assert "--fp16 false" in err
        assert not (tmp_path / "out").exists()
        main([*argv, "--dry_run", "true"])
        assert "the run itself would stop here" in capsys.readouterr().out


def test_prompts_and_pooling_come_from_the_base_folder_unless_given(tiny_encoder, tmp_path):
    import shutil

    from clpl_moe.encoder.settings import EmbeddingSettings, read_settings, write_settings

    model = shutil.copytree(tiny_encoder, tmp_path / "model")
    write_settings(model, EmbeddingSettings("mean", True, "query: ", "passage: "), max_length=64, hidden_size=32)
    data = write_triplets(tmp_path / "t.jsonl", 4)
    runner = make_runner(arguments(model, data, tmp_path / "a"))
    assert runner.settings == EmbeddingSettings("mean", True, "query: ", "passage: ")
    example = runner.train_dataset[(0, 0)]
    assert example.query.startswith("query: ")
    assert all(text.startswith("passage: ") for text in example.passages)
    options = {"query_instruction_for_retrieval": "find: ", "sentence_pooling_method": "cls", "max_steps": 1}
    runner = make_runner(arguments(model, data, tmp_path / "b", **options))
    assert runner.settings == EmbeddingSettings("cls", True, "find: ", "passage: ")
    runner.run()
    assert read_settings(tmp_path / "b") == runner.settings


def test_heads_of_another_shape_are_refused(tiny_encoder, tmp_path):
    data = write_triplets(tmp_path / "t.jsonl", 4)
    with pytest.raises(UserError, match=r"colbert_linear\.pt: does not fit a head of 32 to 16"):
        make_runner(arguments(tiny_encoder, data, tmp_path / "a", unified_finetuning=True, colbert_dim=16))
