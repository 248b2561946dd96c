import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import Trainer

from clpl_moe.common.errors import Stopped, UserError
from clpl_moe.train.__main__ import main
from clpl_moe.train.stopping import lost_processes_named
from clpl_moe.train.trainer import CLPLTrainer
from helpers.tiny_training import arguments, make_collection, make_runner, read_metrics, write_triplets


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_triplets(tmp_path_factory.mktemp("data") / "train.jsonl", 10)


def signalled(patch, numbers, call=3):
    """Make a training send signals to itself as it begins a forward pass."""
    step, calls = CLPLTrainer.training_step, []

    def training_step(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            for number in numbers:
                os.kill(os.getpid(), number)
        return step(self, *args, **kwargs)

    patch.setattr(CLPLTrainer, "training_step", training_step)


def stop(argv):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    return stopped.value.code


def assert_same_weights(run, expected):
    found, wanted = (load_file(folder / "model.safetensors") for folder in (run, expected))
    assert all(found[name].equal(wanted[name]) for name in wanted)


def test_sigterm_ends_training_after_the_step_with_a_checkpoint(tiny_encoder, data, tmp_path, monkeypatch, capfd):
    """transformers dies at once."""
    before = signal.getsignal(signal.SIGTERM)
    argv = arguments(tiny_encoder, data, tmp_path / "run")
    with monkeypatch.context() as patch:
        signalled(patch, [signal.SIGTERM])
        assert stop(argv) == 143
    err = capfd.readouterr().err
    assert "SIGTERM: saving a checkpoint after this step" in err
    assert f"stopped by SIGTERM after step 3, saved to {tmp_path / 'run' / 'checkpoint-3'}" in err
    assert "Traceback" not in err
    assert signal.getsignal(signal.SIGTERM) == before
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [1, 2, 3]
    main([*argv, "--resume_from_checkpoint", "true"])
    main(arguments(tiny_encoder, data, tmp_path / "whole"))
    assert_same_weights(tmp_path / "run", tmp_path / "whole")


def test_the_run_goes_on_from_there_even_if_its_other_checkpoints_are_models_only(
    tiny_encoder, data, tmp_path, monkeypatch
):
    more = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    argv = arguments(tiny_encoder, data, tmp_path / "run", **more)
    with monkeypatch.context() as patch:
        signalled(patch, [signal.SIGTERM])
        assert stop(argv) == 143
    main([*argv, "--resume_from_checkpoint", "true"])
    main(arguments(tiny_encoder, data, tmp_path / "whole"))
    assert_same_weights(tmp_path / "run", tmp_path / "whole")
    assert not (tmp_path / "run" / "checkpoint-4" / "optimizer.pt").exists()


def test_what_is_due_is_evaluated_first(tiny_encoder, data, tmp_path, monkeypatch):
    """The run that goes on would not evaluate that step, and could choose another best one."""
    more = {"save_strategy": "steps", "save_steps": 1, "dev_language": "ko"}
    more["dev_collection"] = make_collection(tmp_path / "dev")
    argv = arguments(tiny_encoder, data, tmp_path / "run", **more)
    with monkeypatch.context() as patch:
        signalled(patch, [signal.SIGTERM])
        assert stop(argv) == 143
    main([*argv, "--resume_from_checkpoint", "true"])
    assert [r["step"] for r in read_metrics(tmp_path / "run") if "eval_ndcg@10" in r] == [0, 1, 2, 3, 4]
    assert [r["step"] for r in read_metrics(tmp_path / "run") if "train_loss" in r] == [4]


@pytest.mark.parametrize(
    ("options", "stopped_in", "kept"),
    [
        ({"save_strategy": "no"}, 3, []),
        # nDCG is best after steps 2 and 4; with more than two, a checkpoint would go.
        ({"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 2}, 5, [2, 4]),
        # It is best after step 5, which has no checkpoint.
        ({"save_strategy": "steps", "save_steps": 2, "eval_steps": 1}, 5, [4, 6]),
    ],
)
def test_a_checkpoint_that_is_not_due_goes_when_it_is_no_longer_needed(
    tiny_encoder, data, tmp_path, monkeypatch, options, stopped_in, kept
):
    def of_first(self, value):
        return value | {"ndcg@10": [0, 1, 2, 1, 3, 4, 1][self.state.global_step]} if isinstance(value, dict) else value

    monkeypatch.setattr(CLPLTrainer, "of_first", of_first)
    if options["save_strategy"] != "no":
        options = options | {"dev_collection": make_collection(tmp_path / "dev"), "dev_language": "ko"}
    argv = arguments(tiny_encoder, data, tmp_path / "run", max_steps=6, **options)
    with monkeypatch.context() as patch:
        signalled(patch, [signal.SIGTERM], call=stopped_in)
        assert stop(argv) == 143
    found = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert f"checkpoint-{stopped_in}" in found
    main([*argv, "--resume_from_checkpoint", "true"])
    main(arguments(tiny_encoder, data, tmp_path / "whole", max_steps=6, **options))
    for run in ("run", "whole"):
        assert sorted(path.name for path in (tmp_path / run).glob("checkpoint-*")) == [f"checkpoint-{n}" for n in kept]
    assert_same_weights(tmp_path / "run", tmp_path / "whole")


def test_the_end_of_an_epoch_is_not_left_out(tiny_encoder, data, tmp_path, monkeypatch):
    """A signal in its last step: the run that goes on would begin with the next epoch."""
    more = {"dev_collection": make_collection(tmp_path / "dev"), "dev_language": "ko", "save_strategy": "epoch"}
    argv = arguments(tiny_encoder, data, tmp_path / "run", max_steps=6, **more)
    with monkeypatch.context() as patch:
        signalled(patch, [signal.SIGTERM], call=5)
        assert stop(argv) == 143
    main([*argv, "--resume_from_checkpoint", "true"])
    assert [r["step"] for r in read_metrics(tmp_path / "run") if "eval_ndcg@10" in r] == [0, 5, 6]
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]


def test_sigusr1_ends_it_too_where_that_is_asked_for(tiny_encoder, data, tmp_path, monkeypatch):
    options = dict(zip(*[iter(arguments(tiny_encoder, data, tmp_path / "run", stop_on_sigusr1=True))] * 2))
    signalled(monkeypatch, [signal.SIGUSR1])
    runner = make_runner([word for pair in options.items() for word in pair])
    with pytest.raises(Stopped) as stopped:
        runner.run()
    assert stopped.value.exit_code == 128 + signal.SIGUSR1
    assert (tmp_path / "run" / "checkpoint-3").is_dir()


TWICE = """
import sys
from _pytest.monkeypatch import MonkeyPatch
from train.test_stopping import signalled
signalled(MonkeyPatch(), [15, 15])
from clpl_moe.train.__main__ import main
main(sys.argv[1:])
"""


def in_process(code, *argv, launcher=()):
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, *launcher, *code, *map(str, argv)]
    # On a busy machine processes take minutes to load their modules.
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, timeout=900)


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(tiny_encoder, data, tmp_path):
    done = in_process(["-c", TWICE], *arguments(tiny_encoder, data, tmp_path / "run"))
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert not (tmp_path / "run" / "checkpoint-3").exists()


@pytest.mark.slow
def test_processes_stop_after_the_same_step(tiny_encoder, data, tmp_path):
    """Though one of them is signalled first, and while the others are a step ahead or behind."""
    argv = arguments(tiny_encoder, data, tmp_path / "run", max_steps=20, use_cpu=True, dataloader_num_workers=1)
    (tmp_path / "argv.json").write_text(json.dumps(argv))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = in_process([__file__], tmp_path, launcher=launcher)
    assert done.returncode != 0
    assert done.stderr.count("stopped by SIGTERM after step 3") == 1
    assert sorted(path.name for path in tmp_path.glob("code-*")) == ["code-0-143", "code-1-143"]
    written = json.loads((tmp_path / "run" / "checkpoint-3" / "checksums.json").read_text())
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= written.keys()  # the first waited for the second
    main([*argv, "--gradient_accumulation_steps", "2", "--resume_from_checkpoint", "true"])
    assert read_metrics(tmp_path / "run")[-1]["step"] == 20


def test_what_a_lost_process_leaves_to_the_others_is_a_message(monkeypatch):
    gloo = "[/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:40364: Connection reset by peer."
    with pytest.raises(RuntimeError, match="Read error"), lost_processes_named():
        raise RuntimeError(gloo)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    with pytest.raises(UserError, match="another process of this training has ended"), lost_processes_named():
        raise RuntimeError(gloo)
    with pytest.raises(RuntimeError, match="size mismatch"), lost_processes_named():
        raise RuntimeError("size mismatch")


if __name__ == "__main__":
    # One of two processes: the second one signals itself, and is slow to write.
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    if rank == "1":
        signalled(pytest.MonkeyPatch(), [signal.SIGTERM])
        stock = Trainer._save_rng_state
        Trainer._save_rng_state = lambda *args: time.sleep(2) or stock(*args)
    try:
        main(json.loads((folder / "argv.json").read_text()))
    except SystemExit as stopped:
        (folder / f"code-{rank}-{stopped.code}").touch()
        raise


def test_a_process_that_makes_batches_does_not_hold_up_the_exit():
    """Python ends it by SIGTERM, and waits."""
    code = """
from torch.utils.data import DataLoader
from clpl_moe.train.stopping import ignore_in_workers
left = iter(DataLoader(range(9), num_workers=1, worker_init_fn=ignore_in_workers))
next(left)
print("made", flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "made\n"  # loading its modules may take minutes on a busy machine
            assert process.wait(timeout=300) == 0
        finally:
            process.kill()
