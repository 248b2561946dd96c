import json
import math

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback

from clpl_moe.common.files import write_jsonl
from clpl_moe.encoder import Encoder, load_encoder
from clpl_moe.evaluate import evaluation
from clpl_moe.train.__main__ import main
from helpers.calls import Calls
from helpers.tiny_training import (
    arguments,
    make_collection,
    make_runner,
    make_triplets,
    read_metrics,
    refused,
    write_dev_lines,
    write_triplets,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_triplets(tmp_path_factory.mktemp("data") / "train.jsonl", 10)


@pytest.fixture(scope="module")
def run(tiny_encoder, data, tmp_path_factory):
    """A finished run with all that a run can have."""
    folder = tmp_path_factory.mktemp("runs")
    options = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 1,
        "dev_collection": make_collection(folder / "dev"),
        "dev_language": "ko",
        "learning_rate": 1e-2,
        "report_to": "tensorboard",
        "token": "hf_secret",
    }
    main(arguments(tiny_encoder, write_dev_lines(folder / "dev.jsonl"), folder / "run", **options))
    return folder / "run"


def test_every_term_is_logged(run):
    """FlagEmbedding logs one number."""
    records = [record for record in read_metrics(run) if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, 7))
    names = ("contrastive", "penalty", "positive_similarity", "negative_similarity", "negative_query_similarity")
    for record in records:
        assert all(math.isfinite(record[n]) for n in (*names, "learning_rate", "grad_norm", "balance", "z", "epoch"))
        assert [sum(layer) for layer in record["expert_load"]] == pytest.approx([1, 1])
        assert record["grad_norm"] > 0
        # Not every query of a batch has a penalty.
        assert record["loss"] <= record["contrastive"]
    assert records[0]["learning_rate"] > records[-1]["learning_rate"]


def read_tensorboard_tags(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = run.rglob("events.out.tfevents*")
    events = EventAccumulator(str(file.parent))
    events.Reload()
    return set(events.Tags()["scalars"])


def test_layers_go_by_their_own_numbers(tiny_encoder, data, tmp_path):
    main(arguments(tiny_encoder, data, tmp_path / "run", moe_layers="1", max_steps=1, report_to="tensorboard"))
    loads = {tag for tag in read_tensorboard_tags(tmp_path / "run") if "expert_load" in tag}
    assert loads == {"train/expert_load/layer_1/expert_0", "train/expert_load/layer_1/expert_1"}


def test_tensorboard_has_them_too(run):
    tags = read_tensorboard_tags(run)
    names = ("loss", "contrastive", "penalty", "negative_query_similarity", "grad_norm", "expert_load/layer_0/expert_1")
    assert {f"train/{name}" for name in names} < tags
    assert {"eval/ndcg@5", "eval/ndcg@10", "eval/recall@100"} < tags


def test_evaluation_follows_saving_and_the_best_checkpoint_is_the_result(run):
    """FlagEmbedding has no evaluation in training."""
    found = {r["step"]: r for r in read_metrics(run) if "eval_ndcg@10" in r}
    assert list(found) == [0, 2, 4, 6]
    assert all(0 < r["eval_ndcg@5"] <= 1 and r["eval_recall@100"] == 1 for r in found.values())
    best = max(found, key=lambda step: found[step]["eval_ndcg@10"])
    assert best > 0
    assert f"checkpoint-{best}" in {folder.name for folder in run.glob("checkpoint-*")}
    checkpoint = load_file(run / f"checkpoint-{best}" / "model.safetensors")
    result = load_file(run / "model.safetensors")
    assert all(result[name].equal(checkpoint[name]) for name in checkpoint)


@pytest.mark.parametrize(("bf16", "dtype"), [(False, torch.float32), (True, None)])
def test_evaluation_has_the_precision_of_training(tiny_encoder, data, tmp_path, monkeypatch, bf16, dtype):
    asked = []

    def evaluate(encoder, *arguments, **options):
        asked.append(encoder.compute_dtype)
        return whole(encoder, *arguments, **options)

    whole = evaluation.evaluate_retrieval
    monkeypatch.setattr(evaluation, "evaluate_retrieval", evaluate)
    more = {"dev_collection": make_collection(tmp_path / "dev"), "dev_language": "ko", "bf16": bf16}
    main(arguments(tiny_encoder, data, tmp_path / "run", max_steps=1, eval_strategy="steps", eval_steps=1, **more))
    assert asked == [dtype] * 2  # of the base model, and after the step


def test_evaluation_is_that_of_the_saved_model(run):
    from clpl_moe.retrieval.collection import Collection
    from clpl_moe.retrieval.options import EncodingArguments

    collection = Collection.load(run.parent / "dev", "ko", "dev")
    expected = evaluation.evaluate_retrieval(
        Encoder.load(run, compute_dtype=torch.float32), collection, EncodingArguments(24, 40)
    )
    best = max(r["eval_ndcg@10"] for r in read_metrics(run) if r.get("eval_ndcg@10") and r["step"])
    assert best == pytest.approx(expected.metrics["nDCG@10"], abs=1e-6)


def test_only_the_experts_have_moved(run, tiny_encoder):
    base, result = load_file(tiny_encoder / "model.safetensors"), load_file(run / "model.safetensors")
    shared = [name for name in base if name in result and ".intermediate." not in name]
    assert len(shared) > 20
    assert all(result[name].equal(base[name]) for name in shared)
    for layer in (0, 1):
        name = f"encoder.layer.{layer}.intermediate.dense.weight"
        assert result[name].shape == (2, *base[name].shape)
        assert (result[name] - base[name]).abs().max() > 1e-5
        assert f"encoder.layer.{layer}.intermediate.router.weight" in result


def test_frozen_layers_have_not_moved(tiny_encoder, data, tmp_path):
    main(arguments(tiny_encoder, data, tmp_path / "run", num_experts=0, trainable="full", frozen_layers=1))
    before, after = (load_encoder(path)[0].state_dict() for path in (tiny_encoder, tmp_path / "run"))
    moved = {name for name, value in after.items() if not value.equal(before[name])}
    assert moved
    assert all(name.startswith("encoder.layer.1.") for name in moved)
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "embeddings and the lowest 1 layers frozen" in card


def test_heads_of_the_base_survive(run, tiny_encoder):
    """FlagEmbedding drops them without unified fine-tuning; they are random at the next load."""
    folders = [run, *run.glob("checkpoint-*")]
    assert len(folders) > 1
    for folder in folders:
        for name in ("sparse_linear.pt", "colbert_linear.pt"):
            base = torch.load(tiny_encoder / name)
            saved = torch.load(folder / name)
            assert all(saved[key].equal(base[key]) for key in base)


def test_nothing_is_pickled_but_tensors(run):
    """transformers writes its arguments, the hub's token among them."""
    assert not list(run.rglob("training_args.bin"))


def test_config_of_the_run_trains_it_again(run, tmp_path):
    config = yaml.safe_load((run / "train_config.yaml").read_text(encoding="utf-8"))
    assert config["learning_rate"] == 1e-2
    assert config["num_experts"] == 2
    assert "hf_secret" not in (run / "train_config.yaml").read_text()
    assert not {"token", "hub_token"} & config.keys()
    argv = ["--config", str(run / "train_config.yaml"), "--output_dir", str(tmp_path / "again")]
    main(argv)
    again, first = (load_file(folder / "model.safetensors") for folder in (tmp_path / "again", run))
    assert all(again[name].equal(first[name]) for name in first)


def test_folder_that_holds_a_run_is_refused_and_left(run, tiny_encoder, data, capsys):
    """FlagEmbedding overwrites it without a word."""
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    for dry_run in (False, True):
        err = refused(arguments(tiny_encoder, data, run, dry_run=dry_run), capsys)
        assert f"{run}: the folder is not empty" in err
        assert "set resume_from_checkpoint true" in err
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    err = refused(arguments(tiny_encoder, data, run / "README.md"), capsys)
    assert "a file is in the way" in err


def test_early_stopping(tiny_encoder, data, tmp_path):
    main(
        arguments(
            tiny_encoder,
            data,
            tmp_path / "run",
            max_steps=40,
            learning_rate=0,
            save_strategy="steps",
            save_steps=1,
            dev_collection=make_collection(tmp_path / "dev"),
            dev_language="ko",
            early_stopping_patience=2,
        )
    )
    assert max(record["step"] for record in read_metrics(tmp_path / "run")) == 3


def test_without_queries_of_negatives_the_weight_has_no_effect(tiny_encoder, tmp_path):
    data = write_triplets(tmp_path / "train.jsonl", 10, neg_q=None)
    for weight in (0, 0.7):
        main(arguments(tiny_encoder, data, tmp_path / f"{weight}", penalty_weight=weight))
    first, second = (load_file(tmp_path / f"{weight}" / "model.safetensors") for weight in (0, 0.7))
    assert all(first[name].equal(second[name]) for name in first)
    for record in read_metrics(tmp_path / "0.7"):
        assert "penalty" not in record
        assert "loss" not in record or record["loss"] == pytest.approx(record["contrastive"], rel=1e-5)


def test_accumulated_steps_are_steps_on_the_joint_batch(tiny_encoder, tmp_path):
    """With each query's own negatives; here three of four batches that are to be accumulated, all that there are."""
    data = write_triplets(tmp_path / "t.jsonl", 3)
    options = {"in_batch_negatives": False, "optim": "sgd", "learning_rate": 0.1, "max_steps": 4, "max_grad_norm": 0}
    for batch, accumulation in ((4, 1), (1, 4)):
        main(
            arguments(
                tiny_encoder,
                data,
                tmp_path / f"{batch}",
                **options,
                per_device_train_batch_size=batch,
                gradient_accumulation_steps=accumulation,
            )
        )
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("4", "1"))
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [5, 7, 8])
def test_a_short_pass_counts_as_many_queries_as_it_has(tiny_encoder, tmp_path, count):
    """transformers weighs passes alike: a query in a short one counts more."""
    data = write_triplets(tmp_path / "t.jsonl", count)
    options = {"in_batch_negatives": False, "optim": "sgd", "learning_rate": 0.1, "max_steps": 2, "max_grad_norm": 0}
    for batch, accumulation in ((8, 1), (2, 4), (3, 3)):
        split = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        main(arguments(tiny_encoder, data, tmp_path / f"{batch}", **options, **split, use_cpu=True))
    expected, *others = (load_file(tmp_path / name / "model.safetensors") for name in ("8", "2", "3"))
    for found in others:
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
    expected, *others = ([r["loss"] for r in read_metrics(tmp_path / n) if "loss" in r] for n in ("8", "2", "3"))
    for found in others:
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"bf16": True, "gradient_checkpointing": True}, id="bf16"),
        pytest.param(
            {"unified_finetuning": True, "use_self_distill": True, "sub_batch_size": 2, "knowledge_distillation": True},
            id="unified",
        ),
        pytest.param({"num_experts": 0, "trainable": "ffn", "train_group_size": 1}, id="dense"),
        pytest.param({"moe_target": "ffn", "num_experts": 3, "top_k": 2, "router": "softmax_topk"}, id="ffn"),
    ],
)
def test_variants_train_and_load(tiny_encoder, tmp_path, options):
    lines = make_triplets(6, pos_scores=[1.0], neg_scores=[0.4, 0.3, 0.2, 0.1])
    write_jsonl(tmp_path / "t.jsonl", [line | {"pos": line["pos"][:1]} for line in lines])
    main(arguments(tiny_encoder, tmp_path / "t.jsonl", tmp_path / "run", **options))
    losses = [record["loss"] for record in read_metrics(tmp_path / "run") if "loss" in record]
    assert len(losses) == 4
    assert all(math.isfinite(loss) for loss in losses)
    encoder, tokenizer = load_encoder(tmp_path / "run")
    assert encoder.dtype == torch.float32
    assert torch.isfinite(encoder(**tokenizer("abc", return_tensors="pt")).last_hidden_state).all()
    moved = torch.load(tmp_path / "run" / "colbert_linear.pt")["weight"]
    assert moved.equal(torch.load(tiny_encoder / "colbert_linear.pt")["weight"]) != bool(
        options.get("unified_finetuning")
    )


@pytest.mark.parametrize(
    ("options", "found"),
    [
        pytest.param({"save_steps": 1}, "the loss is nan at step 2", id="log"),
        pytest.param({"save_steps": 100, "logging_steps": 100}, "weights are nan or inf at step 4", id="save"),
    ],
)
def test_diverged_training_stops_and_saves_nothing_broken(tiny_encoder, data, tmp_path, capsys, options, found):
    """transformers logs a loss of 0 from then on, and saves the weights."""
    options |= {"learning_rate": 1e30, "max_grad_norm": 0, "save_strategy": "steps"}
    err = refused(arguments(tiny_encoder, data, tmp_path / "run", **options), capsys)
    assert found in err
    assert "Begin again with a lower learning_rate (it was 1e+30) and with clipping" in err
    for path in (tmp_path / "run").rglob("model.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())
    assert not (tmp_path / "run" / "model.safetensors").exists()
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert not metrics.exists() or "NaN" not in metrics.read_text()


@pytest.mark.parametrize("filtered", [True, False])
def test_what_a_scaler_skips_does_not_end_a_run(tiny_encoder, data, tmp_path, monkeypatch, filtered):
    """As in fp16, where a step that overflows is left out; the filter keeps it out of the log as well."""
    runner = make_runner(arguments(tiny_encoder, data, tmp_path / "run", logging_nan_inf_filter=filtered))
    runner.trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    compute, calls = runner.trainer.compute_loss, []

    def compute_loss(*args, **kwargs):
        calls.append(1)
        return compute(*args, **kwargs) * (math.inf if len(calls) == 2 else 1)

    runner.trainer.compute_loss = compute_loss
    runner.run()
    losses = [record["loss"] for record in read_metrics(tmp_path / "run") if "loss" in record]
    assert len(losses) == 4
    assert (losses[1] is None) == (not filtered)
    assert not filtered or all(map(math.isfinite, losses))


# What would wait for a device: numbers, and shapes that depend on values.
READS = [getattr(torch.ops.aten, name).default for name in ("_local_scalar_dense", "nonzero", "masked_select")]


@pytest.mark.parametrize(
    "options",
    [
        {"negatives_cross_device": True},
        {"penalty": "contrastive", "symmetric_weight": 0.1, "false_negative_margin": 0.0, "num_experts": 4, "top_k": 2},
        {"grad_cache_tokens": 64, "balance_loss_weight": 0.1, "trainable": "full", "gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2, "frozen_layers": 1, "bf16": True},
        {"negatives_cross_device": True, "same_tower_negatives": True, "hardness_weight": 2.0, "equal_weights": True},
        {"matryoshka_dims": [32, 8], "matryoshka_weights": [1, 0.5]},
    ],
)
def test_steps_read_nothing_from_the_device(tiny_encoder, tmp_path, options):
    """transformers reads the loss in each."""
    data = write_triplets(tmp_path / "train.jsonl", 20)
    reads = []
    for steps in (2, 4):
        # Batches are made in another process, where nothing is counted.
        more = {"max_steps": steps, "logging_steps": 100, "dataloader_num_workers": 1}
        with Calls() as calls:
            main(arguments(tiny_encoder, data, tmp_path / f"{steps}", **more, **options))
        reads.append(sum(calls.counts[function] for function in READS))
    assert 0 < reads[0] == reads[1]


@pytest.mark.gpu
def test_steps_do_not_wait_for_the_gpu(tiny_encoder, data, tmp_path):
    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step > 0:
                torch.cuda.set_sync_debug_mode("error")

        def on_step_end(self, args, state, control, **kwargs):
            torch.cuda.set_sync_debug_mode("default")

    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("experts wait where there is no grouped kernel")
    runner = make_runner(arguments(tiny_encoder, data, tmp_path / "run", bf16=True))
    runner.trainer.add_callback(Watch())
    try:
        runner.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("options", "packed"),
    [
        ({}, True),
        ({"packing": False}, False),
        ({"sub_batch_size": 2}, False),
        ({"unified_finetuning": True}, False),
    ],
)
def test_batches_are_packed_unless_something_needs_rows(tiny_encoder, data, tmp_path, options, packed):
    runner = make_runner(arguments(tiny_encoder, data, tmp_path / "run", **options))
    batch = next(iter(runner.trainer.get_train_dataloader()))
    assert ("texts" in batch) == packed
    assert ("queries" in batch) != packed
    runner.run()


def test_packed_run_is_the_padded_one(tiny_encoder, data, tmp_path):
    """But for rounding."""
    options = {"optim": "sgd", "learning_rate": 0.1, "trainable": "full", "dataloader_num_workers": 1}
    for packing in (True, False):
        main(arguments(tiny_encoder, data, tmp_path / f"{packing}", packing=packing, **options))
    packed, padded = (load_file(tmp_path / name / "model.safetensors") for name in ("True", "False"))
    base = load_file(tiny_encoder / "model.safetensors")
    assert (packed["embeddings.word_embeddings.weight"] - base["embeddings.word_embeddings.weight"]).abs().max() > 1e-3
    for name in padded:
        torch.testing.assert_close(packed[name], padded[name], atol=1e-5, rtol=1e-4)


def test_metrics_of_an_overwritten_time_are_dropped(tiny_encoder, data, tmp_path):
    runner = make_runner(arguments(tiny_encoder, data, tmp_path / "run", max_steps=1))
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 3, "loss": 1}\n{"step": 4, "lo')
    runner.run()
    assert {record["step"] for record in read_metrics(tmp_path / "run")} == {1}


def test_saved_state_is_json(run):
    assert json.loads((run / "trainer_state.json").read_text())["global_step"] == 6


def test_the_model_counts_steps_and_not_passes(tiny_encoder, data, tmp_path):
    """FlagEmbedding counts forward passes: with accumulation, self-distillation would begin too soon."""
    runner = make_runner(arguments(tiny_encoder, data, tmp_path / "run", max_steps=2, gradient_accumulation_steps=2))
    forward, seen = runner.model.forward, []
    runner.model.forward = lambda **inputs: (seen.append(runner.model.step), forward(**inputs))[1]
    runner.run()
    assert seen == [0, 0, 1, 1]
