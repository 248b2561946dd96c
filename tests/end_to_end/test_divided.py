"""FSDP2 and DeepSpeed divide a model among processes: two do what one does, and a checkpoint goes on with any number.

They run here on a CPU (:mod:`helpers.divided_work`). DeepSpeed has to be installed; scripts/test_tools.sh does it in an
environment of its own.
"""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.divided_work import train_in_processes
from helpers.tiny_training import arguments, make_collection, make_runner, read_metrics, write_triplets

DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
HAVE = ["ddp", "fsdp2", *(["zero2"] if DEEPSPEED else [])]
# The same global batches with one, two and four processes.
BATCH = {
    1: {"per_device_train_batch_size": 4},
    2: {"per_device_train_batch_size": 2},
    4: {"per_device_train_batch_size": 1},
}


def losses(run: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm of each step."""
    return {r["step"]: (r["loss"], r["grad_norm"]) for r in read_metrics(run) if "loss" in r}


def evaluations(run: Path) -> dict[int, float]:
    return {r["step"]: r["eval_ndcg@10"] for r in read_metrics(run) if "eval_ndcg@10" in r}


@pytest.mark.slow
def test_two_processes_do_what_one_does_and_their_checkpoint_goes_on_with_one_and_four(tiny_encoder, tmp_path):
    data, dev = write_triplets(tmp_path / "train.jsonl", 22), make_collection(tmp_path / "dev")
    options = {"negatives_cross_device": True, "use_cpu": True, "z_loss_weight": 0.1, "lr_scheduler_type": "constant"}
    options |= {"dev_collection": dev, "dev_language": "ko", "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    # Weights between base and trained ones, experts that are merged, and trained heads or frozen layers.
    options |= {"merge_experts": True, "merge_base_alpha": [0.5], "trainable": "full", "frozen_layers": 1}
    options |= {"adam_epsilon": 1e-3}  # with the default, the last digits of a gradient near 0 decide a step's sign

    def argv(run: str, processes: int, **more) -> list[str]:
        return arguments(tiny_encoder, data, tmp_path / run, **options | BATCH[processes] | more)

    one = tmp_path / "one"
    make_runner(argv("one", 1)).run()
    expected = losses(one)
    dense = {"num_experts": 0, "merge_experts": None}
    others = [("zero2", argv("2-cached", 2, grad_cache_tokens=16)), ("zero3", argv("2-zero3", 2, **dense))]
    train_in_processes(2, [*((name, argv(f"2-{name}", 2)) for name in HAVE), *(others if DEEPSPEED else [])])
    assert len(expected) == 4
    for name in HAVE:
        run = tmp_path / f"2-{name}"
        for step, found in losses(run).items():
            assert found == pytest.approx(expected[step], rel=1e-5, abs=1e-5), (name, step)
        assert evaluations(run) == pytest.approx(evaluations(one), abs=1e-3)
        for file in sorted(path.relative_to(one) for path in one.rglob("model.safetensors")):
            whole, weights = load_file(one / file), load_file(run / file)
            assert weights.keys() == whole.keys()
            for parameter, value in whole.items():
                torch.testing.assert_close(weights[parameter], value, rtol=1e-4, atol=1e-4, msg=f"{name} {parameter}")
        files = {path.name for path in (run / "checkpoint-4").iterdir()}
        others = {"rng_state.pth", "rng_state_0.pth", "rng_state_1.pth"}
        assert files - others == {path.name for path in (one / "checkpoint-4").iterdir()} - others

    if DEEPSPEED:
        make_runner(argv("dense", 1, **dense)).run()
        for run, alone in (("2-zero3", losses(tmp_path / "dense")), ("2-cached", expected)):
            for step, found in alone.items():
                assert losses(tmp_path / run)[step] == pytest.approx(found, rel=1e-5, abs=1e-5), (run, step)
    # Also by another launcher than the one that wrote the checkpoint.
    goes_on = [(1, name, "ddp") for name in HAVE] + [(4, name, "ddp" if name == "fsdp2" else "fsdp2") for name in HAVE]
    goes_on += [(4, name, name) for name in HAVE if name not in ("ddp", "fsdp2")]
    cases = {}
    for processes, before, after in goes_on:
        run = tmp_path / f"{before}-{processes}-{after}"
        shutil.copytree(tmp_path / f"2-{before}", run)
        shutil.rmtree(run / "checkpoint-4")
        cases[run] = processes, after, argv(run.name, processes, resume_from_checkpoint=True)
        if processes == 1:
            make_runner(cases[run][2]).run()
    train_in_processes(4, [case for processes, *case in cases.values() if processes == 4])
    for run in cases:
        found = losses(run)
        for step in (3, 4):
            assert found[step] == pytest.approx(expected[step], rel=1e-5, abs=1e-5), (run.name, step)
