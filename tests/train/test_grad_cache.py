import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clpl_moe import CLPLLoss
from clpl_moe.data.collator import CLPLCollator
from clpl_moe.data.dataset import Example
from clpl_moe.encoder.settings import EmbeddingSettings
from clpl_moe.moe.config import MoEConfig
from clpl_moe.moe.inject import inject_moe
from clpl_moe.train import model as model_module
from clpl_moe.train.model import CLPLModel
from helpers.distributed_work import train_keeping_gradients
from helpers.grad_cache import assert_close, forward_with_graph, gradients
from helpers.tiny import checkpoint_gradients, make_encoder, perturb_experts
from helpers.tiny_training import arguments, make_runner, make_triplets, read_metrics, refused, write_triplets
from helpers.training_model import train_only


def wrap(encoder, tokenizer, **options):
    return CLPLModel(
        {"model": encoder, "colbert_linear": None, "sparse_linear": None},
        loss=CLPLLoss(0.1, 0.3),
        settings=EmbeddingSettings(pooling="mean"),
        tokenizer=tokenizer,
        unified_finetuning=False,
        use_self_distill=False,
        **options,
    )


def make_model(tokenizer, *, target="intermediate", experts=2, dropout=0.0, trainable="full", double=True, **options):
    encoder = make_encoder(
        vocab_size=len(tokenizer),
        max_position_embeddings=130,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    if experts:
        perturb_experts(inject_moe(encoder, MoEConfig(experts, 1, target)))
    model = wrap(encoder, tokenizer, **options)
    train_only(model.model, trainable)
    return model.train().double() if double else model.train()


def make_batch(tokenizer, count=6, seed=0, **changes):
    lines = make_triplets(count, negatives=2, seed=seed)
    examples = [
        Example(
            line["query"],
            [line["pos"][0], *line["neg"]],
            [[q] if isinstance(q, str) else (q or []) for q in line["neg_q"]],
            None,
            True,
        )
        for line in lines
    ]
    collator = CLPLCollator(
        tokenizer=tokenizer, query_max_len=24, passage_max_len=40, padding=True, return_tensors="pt", packing=True
    )
    batch = collator(examples) | changes
    assert changes or batch["negative_index"] is not None
    return batch


def step(model, batch, dtype=None, seed=5):
    torch.manual_seed(seed)
    # With its cache, autocast would add up the chunks' gradients in bfloat16 where they share one graph.
    with torch.autocast("cpu", dtype, enabled=dtype is not None, cache_enabled=False):
        output = model(**batch)
    output.loss.backward()
    return output, gradients(model)


class TestCLPLModel:
    @pytest.mark.parametrize("budget", [1, 64, 200])
    @pytest.mark.parametrize("target", ["intermediate", "output", "ffn", None])
    def test_gradients_and_terms_are_those_without_caching(self, tiny_tokenizer, target, budget):
        batch = make_batch(tiny_tokenizer)
        options = {"target": target, "experts": 2 if target else 0}
        if target:
            options |= {"balance_loss_weight": 0.3, "z_loss_weight": 0.1}
        expected, wanted = step(make_model(tiny_tokenizer, **options), batch)
        found, got = step(make_model(tiny_tokenizer, grad_cache_tokens=budget, **options), batch)
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=0)
        assert found.terms.keys() == expected.terms.keys()
        assert ("expert_load" in found.terms) == (target is not None)
        for name, value in expected.terms.items():
            torch.testing.assert_close(found.terms[name], value, rtol=1e-5, atol=1e-6)
        assert_close(got, wanted, 1e-10)

    @pytest.mark.parametrize("dtype", [None, torch.bfloat16])
    @pytest.mark.parametrize("trainable", ["moe", "full"])
    def test_dropout_is_drawn_again_as_it_was(self, tiny_tokenizer, monkeypatch, trainable, dtype):
        """Also under autocast; compared with the same chunks with graphs, since masks depend on what is drawn together."""
        batch = make_batch(tiny_tokenizer)
        options = {"trainable": trainable, "dropout": 0.2, "grad_cache_tokens": 100, "balance_loss_weight": 0.1}
        options["double"] = dtype is None  # autocast leaves float64 alone
        found, got = step(make_model(tiny_tokenizer, **options), batch, dtype)
        monkeypatch.setattr(model_module, "cached_forward", forward_with_graph)
        expected, wanted = step(make_model(tiny_tokenizer, **options), batch, dtype)
        other, _ = step(make_model(tiny_tokenizer, **options), batch, dtype, seed=6)
        assert found.loss == expected.loss != other.loss
        assert_close(got, wanted, 1e-6)
        assert all("intermediate" in name for name in got) == (trainable == "moe")

    def test_without_in_batch_negatives_and_without_pairs(self, tiny_tokenizer):
        for changes in ({"no_in_batch_neg_flag": True}, {"negative_query_rows": None, "negative_index": None}):
            batch = make_batch(tiny_tokenizer, **changes)
            _, wanted = step(make_model(tiny_tokenizer), batch)
            _, got = step(make_model(tiny_tokenizer, grad_cache_tokens=64), batch)
            assert_close(got, wanted, 1e-10)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_together_with_gradient_checkpointing(self, tiny_tokenizer, reentrant):
        batch = make_batch(tiny_tokenizer)
        _, wanted = step(make_model(tiny_tokenizer), batch)
        model = make_model(tiny_tokenizer, grad_cache_tokens=64)
        checkpoint_gradients(model.model, reentrant)
        found, got = step(model, batch)
        assert_close(got, wanted, 1e-10)
        assert found.terms["expert_load"].sum(1).tolist() == pytest.approx([1, 1])

    def test_in_evaluation_mode_nothing_is_cached(self, tiny_tokenizer):
        batch = make_batch(tiny_tokenizer)
        cached, plain = (make_model(tiny_tokenizer, grad_cache_tokens=tokens).eval()(**batch) for tokens in (8, None))
        assert cached.loss is None
        torch.testing.assert_close(cached.q_reps, plain.q_reps)


class TestTraining:
    def test_a_run_with_caching_is_the_run_without(self, tiny_encoder, tmp_path):
        """With gradient accumulation and the routers' losses; loads are logged once."""
        data = write_triplets(tmp_path / "train.jsonl", 24)
        options = {
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "max_steps": 3,
            "max_grad_norm": 0,
            "balance_loss_weight": 0.1,
            "optim": "sgd",
        }
        runs = {}
        for tokens in (None, 60):
            argv = arguments(tiny_encoder, data, tmp_path / str(tokens), grad_cache_tokens=tokens, **options)
            runs[tokens], _ = train_keeping_gradients(argv)
        assert_close(runs[60], runs[None])
        for cached, plain in zip(read_metrics(tmp_path / "60"), read_metrics(tmp_path / "None"), strict=True):
            if "loss" in plain:
                assert cached["loss"] == pytest.approx(plain["loss"], rel=1e-5)
                for shares, expected in zip(cached["expert_load"], plain["expert_load"], strict=True):
                    assert shares == pytest.approx(expected)

    def test_the_trainer_forwards_chunks(self, tiny_encoder, tmp_path):
        data = write_triplets(tmp_path / "train.jsonl", 24)
        runner = make_runner(arguments(tiny_encoder, data, tmp_path / "run", grad_cache_tokens=80, max_steps=1))
        sizes = []
        runner.model.model.embeddings.register_forward_pre_hook(
            lambda m, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        runner.run()
        assert len(sizes) > 4
        assert max(sizes) <= 80
        assert sizes[: len(sizes) // 2] == sizes[len(sizes) // 2 :]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"grad_cache_tokens": 0}, "grad_cache_tokens: found 0, expected at least 1"),
            ({"unified_finetuning": True}, "unified_finetuning needs every token's"),
            ({"sub_batch_size": 2}, "grad_cache_tokens and sub_batch_size"),
            ({"fsdp": "full_shard"}, "FSDP shards"),
        ],
    )
    def test_what_does_not_go_together_is_refused(self, tiny_encoder, tmp_path, capsys, options, message):
        data = write_triplets(tmp_path / "train.jsonl")
        argv = arguments(tiny_encoder, data, tmp_path / "run", **({"grad_cache_tokens": 64} | options))
        assert message in refused(argv, capsys)
        assert not (tmp_path / "run").exists()


MEMORY_WORK = """
import sys
sys.path.insert(0, sys.argv[1])
from test_grad_cache import peak_of_step
print(peak_of_step(int(sys.argv[2]), eval(sys.argv[3])))
"""


def peak_of_step(batch_size, budget):
    """Highest resident memory in KiB of a training step, in a process of its own."""
    from helpers.tiny import make_tokenizer

    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    encoder = make_encoder(
        vocab_size=len(tokenizer),
        max_position_embeddings=130,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
    )
    inject_moe(encoder, MoEConfig(2, 1))
    model = wrap(encoder, tokenizer, grad_cache_tokens=budget).train()
    batch = make_batch(tokenizer, batch_size)
    model(**batch).loss.backward()
    # Not getrusage: its figure begins with what the test run itself had when it started this process.
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status).group(1))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's record of the peak")
def test_batch_256_in_the_memory_of_batch_16():
    def peak(batch_size, budget):
        command = [sys.executable, "-c", MEMORY_WORK, str(Path(__file__).parent), str(batch_size), str(budget)]
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
        }
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return int(done.stdout)

    small, cached, uncached = peak(16, None), peak(256, 2048), peak(256, None)
    assert cached <= 1.3 * small, (small, cached, uncached)
    assert uncached > 2 * small, (small, cached, uncached)


CASES = {
    "joint": {"negatives_cross_device": True, "balance_loss_weight": 0.1, "z_loss_weight": 0.1},
    "own": {"in_batch_negatives": False, "trainable": "full"},
    "accumulated": {"gradient_accumulation_steps": 2, "negatives_cross_device": True, "trainable": "full"},
    "terms": {
        "negatives_cross_device": True,
        "same_tower_negatives": True,
        "hardness_weight": 2.0,
        "equal_weights": True,
        "penalty": "contrastive",
    },
    "searched": {"ddp_find_unused_parameters": True, "negatives_cross_device": True, "trainable": "full"},
}


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one_without_caching(tiny_encoder, tmp_path):
    data = write_triplets(tmp_path / "train.jsonl", 32)
    options = {"max_grad_norm": 0, "max_steps": 3, "optim": "sgd", "learning_rate": 0.1}
    cases = {
        name: arguments(tiny_encoder, data, tmp_path / f"two-{name}", grad_cache_tokens=50, **options, **more)
        for name, more in CASES.items()
    }
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    script = Path(__file__).parents[1] / "helpers" / "distributed_work.py"
    done = subprocess.run(
        [sys.executable, *launcher, script, tmp_path],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for name, more in CASES.items():
        argv = arguments(tiny_encoder, data, tmp_path / f"one-{name}", **options, **more, per_device_train_batch_size=4)
        expected, _ = train_keeping_gradients(argv)
        assert sum("router" in parameter for parameter in expected) == 2
        for rank in (0, 1):
            found, processes = torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=False)
            assert processes == 2
            assert_close(found, expected)
        one, two = (read_metrics(tmp_path / f"{count}-{name}") for count in ("one", "two"))
        assert [r["loss"] for r in two if "loss" in r] == pytest.approx(
            [r["loss"] for r in one if "loss" in r], rel=1e-3
        )
