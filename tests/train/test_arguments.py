import dataclasses
import json

import pytest
import torch

from clpl_moe.common.errors import UserError
from clpl_moe.encoder import precision
from clpl_moe.train.__main__ import main
from clpl_moe.train.arguments import CLPLDataArguments, CLPLModelArguments, CLPLTrainingArguments
from helpers.tiny_training import arguments, make_runner, refused, write_triplets

without_accelerator = pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")


def training(**options):
    return CLPLTrainingArguments(output_dir="out", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature is 0"),
        ({"penalty_weight": -0.1}, "penalty_weight is -0.1"),
        ({"balance_loss_weight": -1}, "balance_loss_weight is -1"),
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
        ({"use_mrl": True}, "use_mrl"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0: choose a number of at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0"),
        ({"learning_rate": -1e-5}, "learning_rate is -1e-05"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"z_loss_weight": float("nan")}, "z_loss_weight is nan"),
        ({"dev_batch_tokens": 0}, "dev_batch_tokens is 0"),
        ({"early_stopping_patience": 0}, "early_stopping_patience is 0"),
        ({"save_steps": 0}, "save_steps is 0"),
        ({"logging_steps": -3}, "logging_steps is -3"),
        ({"num_train_epochs": 0}, "num_train_epochs is 0"),
        ({"sub_batch_size": 0}, "sub_batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers is -1"),
        ({"auto_find_batch_size": True}, "no effect in this training: lower per_device_train_batch_size"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1, and has no effect"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha is 5.0, and has no effect"),
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
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of is 0"),
        ({"max_example_num_per_dataset": 0}, "max_example_num_per_dataset is 0"),
        ({"shuffle_ratio": -1}, "shuffle_ratio is -1"),
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
    with pytest.raises(ValueError, match="config_name has no effect"):
        CLPLModelArguments(model_name_or_path="m", config_name="n")


def test_evaluation_follows_saving():
    args = training(dev_collection="d", dev_language="ko", save_strategy="steps", save_steps=7)
    assert (args.eval_strategy.value, args.eval_steps) == ("steps", 7)
    assert args.load_best_model_at_end
    assert args.greater_is_better


@without_accelerator
def test_several_gpus_without_torchrun(monkeypatch, caplog):
    """transformers' way of taking them all divides tensors by rows, which packed texts have none of."""
    monkeypatch.setattr(CLPLTrainingArguments, "n_gpu", property(lambda self: self._n_gpu or 2))
    assert training().n_gpu == 1
    assert "one of 2 GPUs; on all of them: torchrun --nproc_per_node 2" in caplog.text


@pytest.mark.parametrize("fast", [True, False])
def test_bf16_where_the_hardware_is_fast_at_it_unless_said_otherwise(monkeypatch, fast):
    monkeypatch.setattr(precision, "fast_bfloat16", lambda device: fast)
    assert training(use_cpu=True).bf16 is fast
    assert training(use_cpu=True, bf16=not fast).bf16 is not fast
    assert training(use_cpu=True, fp16=True).bf16 is False


@without_accelerator
def test_what_makes_training_slow_is_said(monkeypatch, caplog):
    monkeypatch.setattr(precision, "fast_bfloat16", lambda device: False)
    training(use_cpu=True, bf16=False)
    assert not caplog.text
    training(bf16=True)
    assert "no GPU was found: training on the CPU" in caplog.text
    assert "bf16 is emulated on this cpu" in caplog.text


def test_losses_are_filtered_where_steps_are_skipped():
    assert training(use_cpu=True).logging_nan_inf_filter is False
    assert training(use_cpu=True, fp16=True).logging_nan_inf_filter is True
    assert training(use_cpu=True, logging_nan_inf_filter=True).logging_nan_inf_filter is True


def test_fsdp_on_a_cpu_is_none(caplog):
    training(use_cpu=True, fsdp="full_shard")
    assert "fsdp is for GPUs" in caplog.text


def test_encoding_in_training_follows_its_precision(monkeypatch):
    monkeypatch.setattr(precision, "fast_bfloat16", lambda device: True)
    assert training(use_cpu=True, bf16=False).encode_dtype == torch.float32
    assert training(use_cpu=True).encode_dtype is None
    assert training(use_cpu=True, fp16=True).encode_dtype is None


@without_accelerator
def test_processes_that_tokenise():
    """An accelerator is not to wait for the tokenizer; on a CPU, they would take it from the training."""
    assert training(use_cpu=True).dataloader_num_workers == 0
    assert training(dataloader_num_workers=3).dataloader_num_workers == 3


@without_accelerator
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
        assert "set fp16 false" in err
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
    none = {"query_instruction_for_retrieval": "", "passage_instruction_for_retrieval": "", "max_steps": 1}
    runner = make_runner(arguments(model, data, tmp_path / "none", **none))
    assert not runner.train_dataset[(0, 0)].query.startswith("query: ")
    runner.run()
    assert read_settings(tmp_path / "none").query_prompt == ""
    # What the run was stands in its configuration.
    again = ["--config", str(tmp_path / "none" / "train_config.yaml"), "--output_dir", str(tmp_path / "again")]
    assert make_runner(again).settings == runner.settings
    options = {"query_instruction_for_retrieval": "find: ", "sentence_pooling_method": "cls", "max_steps": 1}
    runner = make_runner(arguments(model, data, tmp_path / "b", **options))
    assert runner.settings == EmbeddingSettings("cls", True, "find: ", "passage: ")
    runner.run()
    assert read_settings(tmp_path / "b") == runner.settings
    options = {
        "query_instruction_format": "Task: {}Query: {}",
        "query_max_len": 30,
        "passage_max_len": 20,
        "max_steps": 1,
    }
    runner = make_runner(arguments(model, data, tmp_path / "c", **options))
    example = runner.train_dataset[(0, 0)]
    assert example.query.startswith("Task: query: Query: ")
    runner.run()
    assert read_settings(tmp_path / "c").query_prompt == "Task: query: Query: "
    # Training on shorter texts makes no encoder of shorter ones.
    assert json.loads((tmp_path / "c" / "sentence_bert_config.json").read_text())["max_seq_length"] == 64


def test_heads_of_another_shape_are_refused(tiny_encoder, tmp_path):
    data = write_triplets(tmp_path / "t.jsonl", 4)
    with pytest.raises(UserError, match=r"colbert_linear\.pt does not fit a head of 32 to 16"):
        make_runner(arguments(tiny_encoder, data, tmp_path / "a", unified_finetuning=True, colbert_dim=16))


class Hub:
    """Stands in for the hub: gives the files of one folder, or no answer."""

    def __init__(self, monkeypatch, folder):
        self.folder, self.asked, self.error = folder, [], None
        monkeypatch.setattr("huggingface_hub.hf_hub_download", self.download)

    def download(self, repository, name, **hub):
        from huggingface_hub.errors import EntryNotFoundError

        self.asked.append((name, hub))
        if self.error is not None:
            raise self.error.__new__(self.error)
        if not (self.folder / name).exists():
            raise EntryNotFoundError.__new__(EntryNotFoundError)
        return str(self.folder / name)


def test_heads_of_a_hub_model(tiny_encoder, tmp_path, monkeypatch, caplog):
    from huggingface_hub.errors import LocalEntryNotFoundError

    from clpl_moe.train.heads import read_heads

    hub = Hub(monkeypatch, tiny_encoder)
    heads = read_heads("someone/m3", required=False, cache_dir="cache", token="secret")
    assert heads["sparse_linear.pt"]["weight"].equal(torch.load(tiny_encoder / "sparse_linear.pt")["weight"])
    assert list(heads) == ["sparse_linear.pt", "colbert_linear.pt"]
    assert hub.asked[0] == ("sparse_linear.pt", {"cache_dir": "cache", "token": "secret"})
    # A model that has none, and is known to have none.
    hub.folder = tmp_path
    assert read_heads("someone/e5", required=True) == {}
    assert not caplog.records
    # It cannot be told: warned of where they are only kept, an error where they are trained.
    hub.error = LocalEntryNotFoundError
    assert read_heads("someone/m3", required=False) == {}
    assert "cannot be told whether there are sparse and multi-vector heads" in caplog.text
    with pytest.raises(UserError, match="someone/m3: neither a folder here nor a model that the hub gives"):
        read_heads("someone/m3", required=True)


def test_heads_that_cannot_be_read(tiny_encoder, tmp_path):
    from clpl_moe.train.heads import read_heads

    (tmp_path / "sparse_linear.pt").write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"sparse_linear\.pt: the head cannot be read"):
        read_heads(str(tmp_path), required=False)


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


def test_the_loss_has_the_options_of_training():
    given = {"temperature": 0.5, "penalty_weight": 0.25, "penalty": "contrastive", "symmetric_weight": 2.0}
    given |= {"in_batch_negatives": True, "false_negative_margin": 0.125}
    options = training(**given, negatives_cross_device=True, normalize_embeddings=False, use_cpu=True).loss_options()
    assert dataclasses.asdict(options) == given | {"normalize": False, "gather_across_devices": True}
