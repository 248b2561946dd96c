import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.distributed_work import train_keeping_gradients
from helpers.tiny_training import arguments, make_collection, make_runner, read_metrics, write_triplets

# FlagEmbedding's gradients under negatives_cross_device are 1 / processes of one process's; and on a machine without
# accelerators its processes do not find each other, each trains alone.

WAIT = 900  # seconds: on a busy machine processes take minutes to load their modules

CASES = {
    "joint": {"negatives_cross_device": True, "balance_loss_weight": 0.1, "z_loss_weight": 0.1},
    "own": {"in_batch_negatives": False},
    "unified": {
        "negatives_cross_device": True,
        "in_batch_negatives": True,
        "trainable": "full",
        "knowledge_distillation": True,
    },
    "lora": {"negatives_cross_device": True, "trainable": "lora", "lora_rank": 4},
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
        file = "adapter_model.safetensors" if name == "lora" else "model.safetensors"
        one, two = (load_file(tmp_path / f"{count}-{name}" / file) for count in ("one", "two"))
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
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT)
    assert done.returncode == 0, done.stderr[-4000:]
    for line in ("base model  ", "saved to ", "Next: "):
        assert done.stdout.count(line) == 1
    assert done.stderr.count("without any effect") == 1


@pytest.mark.slow
def test_processes_share_the_evaluation_of_the_merged_model(tiny_encoder, tmp_path):
    data, dev = write_triplets(tmp_path / "train.jsonl", 8), make_collection(tmp_path / "dev")
    more = {"dev_collection": dev, "dev_language": "ko", "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    argv = arguments(tiny_encoder, data, tmp_path / "run", **more, use_cpu=True, merge_experts=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, "-m", "clpl_moe.train", *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT)
    assert done.returncode == 0, done.stderr[-4000:]
    assert sum(line.startswith("merged ") for line in done.stdout.splitlines()) == 1
    assert (tmp_path / "run" / "experts" / "model.safetensors").is_file()


def start(processes, argv, script=None):
    """Real ``torchrun``; ``script`` is a shell's, run by each process with the arguments of the command."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*launcher, "-m", "clpl_moe.train", *argv]
    if script is not None:
        command = [*launcher, "--no-python", "bash", "-c", script, sys.executable, *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_killed_process_ends_the_others_with_a_message(tiny_encoder, tmp_path):
    data = write_triplets(tmp_path / "train.jsonl", 22)
    argv = arguments(tiny_encoder, data, tmp_path / "run", max_steps=100_000, use_cpu=True)
    script = f'[ $RANK = 1 ] && echo $BASHPID > {tmp_path}/pid; exec "$0" -m clpl_moe.train "$@"'
    running = start(2, argv, script)
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert running.poll() is None
        time.sleep(0.1)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    out, err = running.communicate(timeout=WAIT)
    assert running.returncode == 1
    assert "[rank0]: " not in err  # where torch shows a traceback
    # torchrun may be faster than the news.
    assert "another process of this training has ended" in err or "Signal 15 (SIGTERM) received" in err + out


@pytest.mark.slow
def test_more_processes_than_examples(tiny_encoder, tmp_path):
    """Each has something to do, and three examples count."""
    data = write_triplets(tmp_path / "train.jsonl", 3)
    options = {"in_batch_negatives": False, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0, "use_cpu": True}
    running = start(4, arguments(tiny_encoder, data, tmp_path / "four", **options))
    _, err = running.communicate(timeout=WAIT)
    assert running.returncode == 0, err[-4000:]
    options["per_device_train_batch_size"] = 8
    train_keeping_gradients(arguments(tiny_encoder, data, tmp_path / "one", **options))
    one, four = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "four"))
    for name in one:
        torch.testing.assert_close(four[name], one[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_fault_that_one_process_sees_ends_all_and_nothing_is_written(tiny_encoder, tmp_path):
    write_triplets(tmp_path / "0.jsonl", 6)
    write_triplets(tmp_path / "1.jsonl", 6)
    with (tmp_path / "1.jsonl").open("a") as file:
        file.write('{"query": 3}\n')
    argv = arguments(tiny_encoder, tmp_path / "RANK.jsonl", tmp_path / "run", use_cpu=True)
    running = start(2, argv, 'exec "$0" -m clpl_moe.train "${@//RANK/$RANK}"')
    _, err = running.communicate(timeout=WAIT)
    assert running.returncode == 1
    assert f"error: {tmp_path / '1.jsonl'}:7: field 'query': found a number" in err
    assert not (tmp_path / "run" / "train_config.yaml").exists()


@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_processes(tiny_encoder, tmp_path):
    """The same examples in each step; without dropout and in-batch negatives also the same gradients."""
    data = write_triplets(tmp_path / "train.jsonl", 11)
    options = {"in_batch_negatives": False, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0, "use_cpu": True}
    options |= {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "lr_scheduler_type": "constant"}
    one = {**options, "gradient_accumulation_steps": 2}
    train_keeping_gradients(arguments(tiny_encoder, data, tmp_path / "whole", **one))
    train_keeping_gradients(arguments(tiny_encoder, data, tmp_path / "run", **one | {"max_steps": 2}))
    running = start(2, arguments(tiny_encoder, data, tmp_path / "run", **options, resume_from_checkpoint=True))
    _, err = running.communicate(timeout=WAIT)
    assert running.returncode == 0, err[-4000:]
    assert "2 processes, but the run to resume had 1: the batches are the same" in err
    whole, run = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    for name in whole:
        torch.testing.assert_close(run[name], whole[name], rtol=1e-4, atol=1e-5)


def test_one_process_where_several_were_asked_for_says_so(tiny_encoder, tmp_path, monkeypatch, caplog):
    """``accelerate launch --cpu --num_processes 2`` starts one, with this in its environment."""
    data = write_triplets(tmp_path / "train.jsonl", 4)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    make_runner(arguments(tiny_encoder, data, tmp_path / "run", use_cpu=True))
    assert "several processes were asked for, and this is the only one" in caplog.text
