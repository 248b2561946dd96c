import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.distributed_work import train_keeping_gradients
from helpers.tiny_training import arguments, read_metrics, write_triplets

# FlagEmbedding's gradients under negatives_cross_device are 1 / processes of one process's; and on a machine without
# accelerators its processes do not find each other, each trains alone.

CASES = {
    "joint": {"negatives_cross_device": True, "balance_loss_weight": 0.1, "z_loss_weight": 0.1},
    "own": {"in_batch_negatives": False},
    "unified": {
        "negatives_cross_device": True,
        "in_batch_negatives": True,
        "trainable": "full",
        "knowledge_distillation": True,
    },
}


@pytest.mark.slow
def test_two_processes_do_what_one_does_with_their_joint_batch(tiny_encoder, tmp_path):
    data = write_triplets(tmp_path / "train.jsonl", 22, pos_scores=[1.0, 0.9], neg_scores=[0.3, 0.1, 0.5, 0.2])
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    for line in lines:
        line["pos_scores"] = line["pos_scores"][: len(line["pos"])]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {"max_grad_norm": 0, "max_steps": 8, "optim": "sgd", "learning_rate": 0.1}

    cases = {
        name: arguments(tiny_encoder, data, tmp_path / f"two-{name}", **options, **more) for name, more in CASES.items()
    }
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
    script = Path(__file__).parents[1] / "helpers" / "distributed_work.py"
    done = subprocess.run(
        [
            sys.executable,
            *launcher,
            "--rdzv_backend",
            "c10d",
            "--rdzv_endpoint",
            "localhost:0",
            script,
            tmp_path,
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]

    for name, more in CASES.items():
        options["per_device_train_batch_size"] = 4
        argv = arguments(tiny_encoder, data, tmp_path / f"one-{name}", **options, **more)
        expected, _ = train_keeping_gradients(argv)
        assert any(gradient.abs().max() > 0.01 for gradient in expected.values())
        assert sum("router" in parameter for parameter in expected) == 2
        for rank in (0, 1):
            gradients, processes = torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=False)
            assert processes == 2
            assert gradients.keys() == expected.keys()
            for parameter, gradient in expected.items():
                torch.testing.assert_close(
                    gradients[parameter],
                    gradient,
                    rtol=1e-5,
                    atol=1e-5,
                    msg=lambda m: f"{name} {parameter}: {m}",
                )
        # All steps together: 22 examples in global batches of 4, the last one short, and into the next epoch.
        one, two = (load_file(tmp_path / f"{count}-{name}" / "model.safetensors") for count in ("one", "two"))
        for parameter in one:
            torch.testing.assert_close(two[parameter], one[parameter], rtol=1e-4, atol=1e-4)
        one, two = (read_metrics(tmp_path / f"{count}-{name}") for count in ("one", "two"))
        assert [r["step"] for r in two] == [r["step"] for r in one]
        for a, b in zip(one, two):
            if "loss" in a:
                for term in ("loss", "contrastive", "negative_similarity", "learning_rate", "grad_norm"):
                    assert b[term] == pytest.approx(a[term], rel=1e-3, abs=1e-4), (name, term, a["step"])


@pytest.mark.slow
def test_only_the_first_process_prints(tiny_encoder, tmp_path):
    data = write_triplets(tmp_path / "train.jsonl", 8)
    argv = arguments(tiny_encoder, data, tmp_path / "run", max_steps=1, use_cpu=True, use_fast_tokenizer=False)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, "-m", "clpl_moe.train", *argv]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for line in ("base model  ", "saved to ", "Next: "):
        assert done.stdout.count(line) == 1
    assert done.stderr.count("without any effect") == 1
