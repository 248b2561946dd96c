import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from clpl_moe.encoder.frozen_cache import frozen_cache_of
from helpers.tiny_training import arguments, make_collection, make_runner, read_metrics, refused, write_triplets


@pytest.fixture
def data(tmp_path):
    return write_triplets(tmp_path / "train.jsonl", 8)


def test_on_a_cpu_freed_memory_is_kept(tiny_encoder, data, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("clpl_moe.train.runner.keep_freed_memory", lambda: calls.append(True))
    make_runner(arguments(tiny_encoder, data, tmp_path / "run", use_cpu=True))
    assert calls == [True]


def test_of_a_model_that_is_nowhere_only_that_is_told(data, tmp_path, capsys, caplog):
    for dry_run in (False, True):
        err = refused(arguments("no/where", data, tmp_path / "run", use_cpu=True, dry_run=dry_run), capsys)
        assert "error: no/where: neither a folder here nor a model" in err
    assert not caplog.records


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


@pytest.mark.slow
def test_processes_share_the_evaluation_and_the_first_one_decides(tiny_encoder, data, tmp_path):
    """Each by itself encodes everything, and where their floats differ they wait for each other for ever."""
    more = {"dev_collection": make_collection(tmp_path / "dev"), "dev_language": "ko", "max_steps": 8, "use_cpu": True}
    more |= {"save_strategy": "steps", "save_steps": 1, "early_stopping_patience": 2}
    (tmp_path / "argv.json").write_text(json.dumps(arguments(tiny_encoder, data, tmp_path / "run", **more)))
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    done = subprocess.run(
        [*command, str(tmp_path)], capture_output=True, text=True, timeout=900, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    # The first process's metrics are 0.9 of the base model, 0.5, 0.4, 0.4, the second one would go on.
    assert [f["steps"] for f in found] == [3, 3]
    assert [Path(f["best"]).name for f in found] == ["checkpoint-1", "checkpoint-1"]
    assert [sum(counts) for counts in zip(*(f["encoded"] for f in found), strict=True)] == [12] * 4  # each passage once
    assert [r["eval_ndcg@10"] for r in read_metrics(tmp_path / "run") if "eval_ndcg@10" in r] == [0.9, 0.5, 0.4, 0.4]
    # The base model is better for the first process, and worse for the second one.
    assert [f["alpha"] for f in found] == [0, 0]
    assert [f["holds"] for f in found] == [True, True]
    assert not (tmp_path / "run" / "_clpl_moe" / "embeddings").exists()


if __name__ == "__main__":
    # One of two processes: what it decided, and how many passages it encoded at each evaluation.
    import torch

    from clpl_moe.encoder import Encoder
    from clpl_moe.evaluate import evaluation
    from clpl_moe.retrieval import store

    folder, rank, store.SHARD_TEXTS = Path(sys.argv[1]), os.environ["RANK"], 6
    encoded, stock = [], store.encode_passages

    def encode_passages(*args, **kwargs):
        shards = stock(*args, **kwargs)
        encoded.append(shards.encoded)
        return shards

    store.encode_passages = evaluation.encode_passages = encode_passages
    runner = make_runner(json.loads((folder / "argv.json").read_text()))
    evaluate = runner.trainer.evaluator

    def evaluator(encoder):
        evaluate(encoder)
        value = 0.1 * len(encoded) if rank == "1" else (0.9, 0.5, 0.4, 0.4)[len(encoded) - 1]
        return dict.fromkeys(("ndcg@5", "ndcg@10", "recall@100"), value)

    runner.trainer.evaluator = evaluator
    result = runner.run()
    base = runner.model_args.model_name_or_path
    texts = ["abc", "def ghi"]
    kept, expected = (Encoder.load(f, device="cpu").encode_queries(texts) for f in (result.folder, base))
    state = {"alpha": result.alpha, "holds": torch.equal(kept, expected)}
    state |= {"steps": runner.trainer.state.global_step, "best": str(result.best_checkpoint), "encoded": encoded}
    (folder / f"{rank}.json").write_text(json.dumps(state))


def frozen_run(tiny_encoder, folder, **options):
    """A run of two epochs over 4 examples with its lower layer frozen, evaluations and a mixture; returns its result, how many
    tokens the trainer's lower layer got, and the caches of what was evaluated."""
    data = write_triplets(folder.parent / "few.jsonl", 4, negatives=2)
    stock = {"num_experts": 0, "trainable": "full", "frozen_layers": 1, "use_cpu": True}
    stock |= {"dev_collection": make_collection(folder.parent / "dev"), "dev_language": "ko"}
    stock |= {"save_strategy": "steps", "save_steps": 2, "merge_base_alpha": 0.5}
    runner = make_runner(arguments(tiny_encoder, data, folder, **stock | options))
    tokens, caches, evaluator = [], [], runner.trainer.evaluator
    layer = runner.encoder.model.encoder.layer[0]
    layer.intermediate.register_forward_hook(lambda module, args, output: tokens.append(args[0].shape[1]))
    runner.trainer.evaluator = lambda encoder: caches.append(frozen_cache_of(encoder.model)) or evaluator(encoder)
    return runner.run(), sum(tokens), caches


def test_frozen_layers_are_computed_once_a_text(tiny_encoder, tmp_path):
    plain, computed, none = frozen_run(tiny_encoder, tmp_path / "plain")
    options = {"frozen_cache_gb": 0.1, "grad_cache_tokens": 64, "gradient_checkpointing": True}
    cached, once, caches = frozen_run(tiny_encoder, tmp_path / "cached", **options)
    assert "frozen cache    outputs of the lowest 1 layers, up to 0.1 GB" in str(cached.plan)
    # The base model, two checkpoints, and a mixture, which is another model.
    assert (len(caches), set(none)) == (4, {None})
    (cache,) = set(caches)
    # All of 2 epochs and 3 evaluations, against each text once.
    assert once == cache._used < 0.5 * computed
    assert cached.candidates == plain.candidates
    found, expected = read_metrics(cached.folder), read_metrics(plain.folder)
    assert len(found) == len(expected)
    for record, like in zip(found, expected):
        assert record.keys() == like.keys()
        for name in {"loss", "contrastive", "grad_norm", "eval_ndcg@10"} & record.keys():
            assert record[name] == pytest.approx(like[name], rel=1e-4), name


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_cache_without_frozen_layers(tiny_encoder, data, tmp_path, capsys, dry_run):
    argv = arguments(tiny_encoder, data, tmp_path / "run", frozen_cache_gb=1, trainable="full", dry_run=dry_run)
    assert "error: --frozen_cache_gb: found no frozen layer" in refused(argv, capsys)
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("train_*"))
