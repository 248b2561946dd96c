import pytest
import torch

from clpl_moe.encoder import precision
from clpl_moe.train.__main__ import main
from clpl_moe.train.arguments import CLPLTrainingArguments
from helpers.tiny_training import arguments, write_triplets

without_accelerator = pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")


def training(**options):
    return CLPLTrainingArguments(output_dir="out", **options)


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
