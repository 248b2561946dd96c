"""What a run says where training did not beat its base model."""

import shlex
from dataclasses import replace

import pytest

from clpl_moe.train import TrainResult, train
from clpl_moe.train.__main__ import main
from clpl_moe.train.verdict import verdict_of
from helpers.processes import run_in_processes
from helpers.tiny_training import arguments, make_collection, make_runner, read_metrics, train_until, write_triplets


def make_argv(model, folder, output="run", **more):
    data = write_triplets(folder / "train.jsonl", 8)
    options = {"dev_collection": make_collection(folder / "dev"), "dev_language": "ko"}
    options |= {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    return arguments(model, data, folder / output, **options | more)


@pytest.fixture(scope="module")
def plan(tiny_encoder, tmp_path_factory):
    return make_runner(make_argv(tiny_encoder, tmp_path_factory.mktemp("plan"))).plan


def metrics(value):
    return {"nDCG@5": 0.9, "nDCG@10": value, "R@100": 1.0}


def verdict(plan, folder, values, records=(), step=2):
    """On a run whose candidates have these values of nDCG@10, by share of the trained weights."""
    found = {alpha: metrics(value) for alpha, value in values.items() if value is not None}
    alpha = max(found, key=lambda alpha: found[alpha]["nDCG@10"])
    result = TrainResult(
        folder, found.get(0), found[alpha], None, folder / "metrics.jsonl", plan, alpha=alpha, candidates=found
    )
    return verdict_of(result, records, step, folder / "checkpoint-2")


def course(**terms):
    """Records of 9 steps: each term goes evenly from one value to another."""
    return [{"step": step + 1, **{name: a + (b - a) * step / 8 for name, (a, b) in terms.items()}} for step in range(9)]


HEALTHY = {
    "loss": (2.0, 1.0),
    "grad_norm": (3.0, 2.0),
    "positive_similarity": (0.8, 0.8),
    "negative_similarity": (0.5, 0.4),
}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({0: 0.5, 1: 0.6}, None),
        ({0: 0.5, 1: 0.4, 0.5: 0.6}, None),  # the mixture is better
        ({1: 0.4}, None),  # the base model was not evaluated
        ({0: 0.5}, None),  # stopped before an evaluation
        ({0: 0.5, 1: 0.5}, "nDCG@10 0.5000 before and after (step 2, 12 dev questions)."),
        ({0: 0.5, 1: 0.3}, "nDCG@10 0.5000 before, 0.3000 after (step 2, 12 dev questions)."),
        ({0: 0.5, 1: 0.3, 0.5: 0.4}, "nDCG@10 0.5000 before, 0.4000 after"),
        ({0: 0.5, 1: 0.45}, "questions).\nOne question can make this difference.\n"),
        ({0: 1.0, 1: 0.95}, "These questions are too easy to show a gain: take more of them, or more passages."),
    ],
)
def test_the_models_are_compared_in_few_words(plan, tmp_path, values, said):
    found = verdict(plan, tmp_path, values)
    assert (found is None) if said is None else (said in str(found))
    if found is not None:
        assert f"\n{tmp_path} holds the base model, {tmp_path / 'checkpoint-2'} the trained one." in str(found)
        assert str(found).count("Try: ") == (0 if found.before == 1 else 1)
        assert "One question" not in str(found) or "too easy" not in str(found)


@pytest.mark.parametrize(
    ("terms", "said"),
    [
        ({}, None),
        ({"positive_similarity": (0.8, 0.8), "negative_similarity": (0.79, 0.79)}, "negatives are as similar as positives"),
        ({"negative_similarity": (0.5, 0.66)}, "negatives became more similar (0.520 to 0.640): mine from a higher"),
        ({"loss": (1.0, 2.0)}, "the loss rose (1.1250 to 1.8750): lower learning_rate"),
        ({"grad_norm": (1.0, 3.0)}, "the gradient grew (1.25 to 2.75): lower learning_rate"),
        ({"loss": (1.0, 2.0), "grad_norm": (1.0, 3.0)}, "the loss rose (1.1250 to 1.8750) and the gradient grew"),
    ],
)  # fmt: skip
def test_only_causes_that_the_records_show_are_named(plan, tmp_path, terms, said):
    """The best checkpoint is not the last one here, so that a falling loss says nothing."""
    text = str(verdict(plan, tmp_path, {0: 0.5, 1: 0.3}, course(**HEALTHY | terms), step=1))
    assert said is None or said in text
    assert text.count("\n- ") == (0 if said is None else 1)
    halved = "--output_dir" in text and "-2 --learning_rate 0.0005 --merge_base_alpha 0.5 0.75" in text
    assert halved == ((said is not None and "learning_rate" in said) or "gradient" in str(said))


def test_three_causes_are_enough(plan, tmp_path):
    cut = replace(plan, lengths=replace(plan.lengths, cut={"query_max_len": (5, 10), "passage_max_len": (77, 100)}))
    worst = {"loss": (1.0, 2.0), "grad_norm": (1.0, 3.0), "negative_similarity": (0.79, 0.9)}
    found = verdict(cut, tmp_path, {0: 0.5, 1: 0.3}, course(**HEALTHY | worst))
    assert [cause.split(":")[0] for cause in found.causes] == [
        "77.0% of the passages are cut at 40 tokens",
        "50.0% of the queries are cut at 24 tokens",
        "the loss rose (1.1250 to 1.8750) and the gradient grew (1.25 to 2.75)",
    ]
    (command,) = found.commands
    assert "--passage_max_len 0 --query_max_len 0 --learning_rate 0.0005" in command


def test_too_few_steps(plan, tmp_path):
    found = verdict(plan, tmp_path, {0: 0.5, 1: 0.3}, course(**HEALTHY))
    assert found.causes == ["the loss still fell (1.8750 to 1.1250): train more than 2 steps"]
    few = course(**HEALTHY)[:5]  # which show no course
    assert verdict(plan, tmp_path, {0: 0.5, 1: 0.3}, few).causes == []


def test_where_mixing_was_tried_the_data_are_looked_at(plan, tmp_path):
    mixed = replace(plan, training_args=replace_args(plan.training_args, merge_base_alpha=[0.5]))
    (command,) = verdict(mixed, tmp_path, {0: 0.5, 1: 0.3, 0.5: 0.4}).commands
    assert command == f"python -m clpl_moe.validate --config {tmp_path / 'train_config.yaml'}"


def replace_args(args, **changes):
    import copy

    args = copy.copy(args)
    for name, value in changes.items():
        setattr(args, name, value)
    return args


def test_the_command_mixes_with_the_base_model(tiny_encoder, tmp_path):
    argv = make_argv(tiny_encoder, tmp_path, learning_rate=1e-1, max_grad_norm=0)
    options = dict(zip((name.removeprefix("--") for name in argv[::2]), argv[1::2]))
    result = train(**options)
    first, last = (record for record in read_metrics(tmp_path / "run") if "eval_ndcg@10" in record)
    assert last["eval_ndcg@10"] < first["eval_ndcg@10"]
    assert (result.verdict.before, result.verdict.after) == (first["eval_ndcg@10"], last["eval_ndcg@10"])
    assert str(result).endswith(str(result.verdict))
    from clpl_moe.merge.__main__ import main as merge

    (command,) = result.verdict.commands
    words = shlex.split(command)
    merge(words[words.index(str(tmp_path / "run/checkpoint-2")) :])
    assert (tmp_path / "run-merged" / "model.safetensors").is_file()


def test_a_resumed_run_says_the_same(tiny_encoder, tmp_path, capsys):
    more = {"max_steps": 4, "learning_rate": 1e-1, "max_grad_norm": 0}
    main(make_argv(tiny_encoder, tmp_path, "whole", **more))
    whole = capsys.readouterr().out
    argv = make_argv(tiny_encoder, tmp_path, "resumed", **more)
    train_until(argv, 4)
    main([*argv, "--resume_from_checkpoint", "true"])
    said = capsys.readouterr().out.replace("/resumed", "/whole")
    assert "Training did not help" in whole
    assert said.partition("Training did not help")[2] == whole.partition("Training did not help")[2]


def _evaluated(rank):
    import torch.distributed as dist

    from clpl_moe.train.runner import _evaluations
    from clpl_moe.train.trainer import CLPLTrainer

    trainer = CLPLTrainer.__new__(CLPLTrainer)
    trainer.args = type("Args", (), {"world_size": dist.get_world_size()})
    values = {"eval_ndcg@5": 0.9, "eval_recall@100": 1.0}
    records = [{"step": step, "eval_ndcg@10": value + rank * step} | values for step, value in ((0, 0.5), (2, 0.4))]
    return trainer.of_first(_evaluations(records))


def test_of_several_processes_the_first_one_decides(plan, tmp_path):
    """On disks of their own, or that show a file late, others see another course."""
    found = run_in_processes(_evaluated, tmp_path)
    assert [evaluated[2]["nDCG@10"] for evaluated in found] == [0.4, 0.4]
