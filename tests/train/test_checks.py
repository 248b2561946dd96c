import pytest
import torch

from clpl_moe.common.errors import UserError
from clpl_moe.encoder import precision
from clpl_moe.train import checks
from clpl_moe.train.__main__ import main
from clpl_moe.train.arguments import CLPLDataArguments, CLPLTrainingArguments
from clpl_moe.train.plan import check_gathering, open_data
from helpers.tiny_training import arguments, make_runner, refused, write_triplets
from helpers.tools import need_tool


@pytest.fixture
def data(tmp_path):
    return write_triplets(tmp_path / "train.jsonl", 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adam_beta1": 5}, "Invalid beta parameter at index 0: 5.0"),
        ({"adam_epsilon": -1}, "Invalid epsilon value: -1.0"),
        ({"optim_args": "odd"}, "optimizer adamw_torch"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type cosine_with_min_lr"),
        ({"lr_scheduler_kwargs": '{"odd": 1}'}, "odd"),
    ],
)
def test_options_that_only_the_optimizer_checks(tiny_encoder, data, tmp_path, capsys, options, message):
    for dry_run in (False, True):
        err = refused(arguments(tiny_encoder, data, tmp_path / "run", dry_run=dry_run, **options), capsys)
        assert message in err
        assert err.count("error: ") == 1
        assert not (tmp_path / "run").exists()


def test_no_batches_no_training(tiny_encoder, data, tmp_path, capsys):
    """transformers saves the base model as trained."""
    argv = arguments(tiny_encoder, data, tmp_path / "run", per_device_train_batch_size=9, dataloader_drop_last=True)
    for more in ([], ["--dry_run", "true"]):
        assert "no file has the 9 examples of a batch" in refused([*argv, *more], capsys)
    assert not (tmp_path / "run").exists()


def test_processes_gather_all_or_none(tmp_path):
    args = CLPLDataArguments(train_data=["t"])
    check_gathering([True, False], args, world_size=1)
    check_gathering([True, True], args, world_size=2)
    with pytest.raises(UserError, match="set same_dataset_within_batch"):
        check_gathering([True, False], args, world_size=2)
    args.same_dataset_within_batch = True
    check_gathering([True, False], args, world_size=2)


def test_a_run_that_would_wait_for_itself_is_refused(tiny_encoder, data, tmp_path, monkeypatch):
    own = write_triplets(tmp_path / "own_no_in_batch_neg.jsonl", 8, seed=1)
    runner = make_runner(arguments(tiny_encoder, [data, own], tmp_path / "run", negatives_cross_device=True))
    monkeypatch.setattr(type(runner.training_args), "world_size", 2)
    with pytest.raises(UserError, match="set same_dataset_within_batch"):
        open_data(runner.data_args, runner.training_args)


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
    checks._warn_of_cpu.cache_clear()
    training(bf16=True)
    training(bf16=True)
    assert caplog.text.count("no GPU was found: training on the CPU") == 1
    assert "bf16 is emulated on this cpu" in caplog.text


def test_losses_are_filtered_where_steps_are_skipped():
    assert training(use_cpu=True).logging_nan_inf_filter is False
    assert training(use_cpu=True, fp16=True).logging_nan_inf_filter is True
    assert training(use_cpu=True, logging_nan_inf_filter=True).logging_nan_inf_filter is True


def test_fsdp_on_a_cpu_is_none(caplog):
    training(use_cpu=True, fsdp="full_shard")
    assert "fsdp is for GPUs" in caplog.text


@pytest.mark.parametrize("name", ["fsdp", "deepspeed"])
def test_a_launcher_that_divides_models_is_told_of_the_cpu(monkeypatch, caplog, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    if name == "deepspeed":
        need_tool("deepspeed")  # which transformers wants then
    training(use_cpu=True)
    assert f"{name} is for GPUs" in caplog.text


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
