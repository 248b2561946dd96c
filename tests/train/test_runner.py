import importlib.util

import pytest
from safetensors import SafetensorError

from helpers.tiny_training import arguments, make_runner, refused, write_triplets


@pytest.fixture
def data(tmp_path):
    return write_triplets(tmp_path / "train.jsonl", 8)


def test_on_a_cpu_freed_memory_is_kept(tiny_encoder, data, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("clpl_moe.train.runner.keep_freed_memory", lambda: calls.append(True))
    make_runner(arguments(tiny_encoder, data, tmp_path / "run", use_cpu=True))
    assert calls == [True]


def test_push_to_hub_without_network(tiny_encoder, data, tmp_path, capsys):
    err = refused(arguments(tiny_encoder, data, tmp_path / "run", push_to_hub=True, hub_model_id="a/b"), capsys)
    assert "error: push_to_hub: the hub does not open the repository" in err
    assert "hf auth login" in err
    assert not list((tmp_path / "run").glob("train_*"))


def test_a_package_that_only_the_trainer_misses(tiny_encoder, data, tmp_path, capsys):
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    err = refused(arguments(tiny_encoder, data, tmp_path / "run", report_to="wandb"), capsys)
    assert "pip install wandb" in err


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/0"),
    ],
)
def test_full_disk(tiny_encoder, data, tmp_path, capsys, monkeypatch, error):
    def save(*args, **kwargs):
        raise error

    # The model's weights at the end, and a checkpoint's optimizer.
    for place, strategy in (("Encoder.save", "no"), ("CLPLTrainer._save_optimizer_and_scheduler", "steps")):
        with monkeypatch.context() as patched:
            patched.setattr(f"clpl_moe.train.trainer.{place}", save)
            folder = tmp_path / strategy
            argv = arguments(tiny_encoder, data, folder, max_steps=1, save_strategy=strategy, save_steps=1)
            assert refused(argv, capsys).splitlines()[-1] == f"error: {folder}: No space left on device"
