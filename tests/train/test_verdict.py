"""What a run says where training did not beat its base model."""

import shlex
from dataclasses import replace

import pytest

from clpl_moe.train import train
from clpl_moe.train.__main__ import main
from clpl_moe.train.verdict import verdict_of
from helpers.processes import run_in_processes
from helpers.tiny_training import arguments, make_collection, make_runner, read_metrics, train_until, write_triplets


def make_argv(model, folder, output="run", **more):
    data = write_triplets(folder / "train.jsonl", 8)
    options = {"dev_collection": make_collection(folder / "dev"), "dev_language": "ko", "eval_on_start": True}
    options |= {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    return arguments(model, data, folder / output, **options | more)


@pytest.fixture(scope="module")
def plan(tiny_encoder, tmp_path_factory):
    return make_runner(make_argv(tiny_encoder, tmp_path_factory.mktemp("plan"))).plan


def evaluated(*values):
    return [{"step": 2 * number, "eval_ndcg@10": value, "eval_ndcg@5": 0.9} for number, value in enumerate(values)]


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
        ((0.5, 0.4, 0.6), None),
        ((0.5, 0.5), "at its best (step 2, nDCG@10 0.5000) the model does not differ from its base model (0.5000)"),
        ((0.5, 0.3, 0.4, 0.2), "at its best (step 4, nDCG@10 0.4000) the model is worse than its base model (0.5000)"),
        ((0.5,), None),  # stopped before an evaluation
    ],
)
def test_the_best_evaluation_is_compared_with_the_first(plan, tmp_path, values, said):
    verdict = verdict_of(plan, evaluated(*values), tmp_path)
    assert (verdict is None) if said is None else (said in str(verdict))


def test_a_run_that_began_without_an_evaluation(plan, tmp_path):
    assert verdict_of(plan, evaluated(0.5, 0.3)[1:], tmp_path) is None


@pytest.mark.parametrize(
    ("terms", "said"),
    [
        ({}, "its records do not show why"),
        (
            {"positive_similarity": (0.8, 0.8), "negative_similarity": (0.79, 0.79)},
            "as similar to the query as its positive",
        ),
        ({"negative_similarity": (0.5, 0.66)}, "more similar to the query (0.520 to 0.640): mine again"),
        ({"loss": (1.0, 2.0)}, "the loss rose (1.1250 to 1.8750): lower learning_rate"),
        ({"grad_norm": (1.0, 3.0)}, "the gradient's norm rose (1.25 to 2.75): lower learning_rate"),
        (
            {"loss": (1.0, 2.0), "grad_norm": (1.0, 3.0)},
            "the loss rose (1.1250 to 1.8750) and the gradient's norm rose",
        ),
    ],
)
def test_only_causes_that_the_records_show_are_named(plan, tmp_path, terms, said):
    """The last evaluation is not the best here, so that a falling loss says nothing."""
    text = str(verdict_of(plan, [*course(**HEALTHY | terms), *evaluated(0.5, 0.4, 0.3)], tmp_path))
    assert said in text
    assert text.count("\n- ") == 1
    assert ("--learning_rate 0.0005" in text) == ("lower learning_rate" in said or "norm rose" in said)


def test_too_few_steps(plan, tmp_path):
    records = [*course(**HEALTHY), *evaluated(0.5, 0.3, 0.4)]
    assert "the loss was still falling (1.8750 to 1.1250) and the last evaluation is the best" in str(
        verdict_of(plan, records, tmp_path)
    )
    few = [*course(**HEALTHY)[:5], *evaluated(0.5, 0.3, 0.4)]  # which show no course
    assert verdict_of(plan, few, tmp_path).causes == []


def test_lengths_that_cut(plan, tmp_path):
    cut = replace(plan, lengths=replace(plan.lengths, cut={"query_max_len": (1, 10), "passage_max_len": (77, 100)}))
    verdict = verdict_of(cut, evaluated(0.5, 0.4), tmp_path)
    assert verdict.commands[1].endswith("-2 --passage_max_len 0")
    (cause,) = verdict.causes
    assert cause == "77.0% of the passages were cut at 40 tokens: raise passage_max_len, or set it to 0"


def test_the_first_command_mixes_with_the_base_model(tiny_encoder, tmp_path):
    argv = make_argv(tiny_encoder, tmp_path, learning_rate=1e-1, max_grad_norm=0)
    options = dict(zip((name.removeprefix("--") for name in argv[::2]), argv[1::2]))
    result = train(**options)
    first, last = (record for record in read_metrics(tmp_path / "run") if "eval_ndcg@10" in record)
    assert last["eval_ndcg@10"] < first["eval_ndcg@10"]
    assert (result.verdict.before, result.verdict.after) == (first["eval_ndcg@10"], last["eval_ndcg@10"])
    assert str(result).endswith(str(result.verdict))
    from clpl_moe.merge.__main__ import main as merge

    words = shlex.split(result.verdict.commands[0])
    merge(words[words.index(str(tmp_path / "run")) :])
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


def _records(rank):
    import torch.distributed as dist

    from clpl_moe.train.trainer import CLPLTrainer

    trainer = CLPLTrainer.__new__(CLPLTrainer)
    trainer.args = type("Args", (), {"world_size": dist.get_world_size()})
    return trainer.of_first(evaluated(0.5, 0.4 + rank))


def test_of_several_processes_the_first_one_decides(plan, tmp_path):
    """On disks of their own, or that show a file late, others see another course."""
    found = run_in_processes(_records, tmp_path)
    verdicts = [verdict_of(plan, records, tmp_path) for records in found]
    assert [verdict.after for verdict in verdicts] == [0.4, 0.4]
