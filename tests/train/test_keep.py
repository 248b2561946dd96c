"""Which weights a run's folder keeps: the trained ones, the base model's, or weights between both."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clpl_moe.common.errors import UserError
from clpl_moe.encoder import Encoder
from clpl_moe.moe.inject import has_experts, merge_experts
from clpl_moe.train import train
from clpl_moe.train.options import DEV_METRICS
from helpers.tiny_training import arguments, make_collection, make_runner, read_metrics, write_triplets

TEXTS = ["abc def", "ghi"]


@pytest.fixture
def argv(tiny_encoder, tmp_path):
    """A run of one step and one checkpoint, with a dev collection."""

    def make(**more):
        options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.1}
        options |= {"dev_collection": make_collection(tmp_path / "dev"), "dev_language": "ko"}
        data = write_triplets(tmp_path / "train.jsonl", 8)
        return arguments(tiny_encoder, data, tmp_path / "run", **options | more)

    return make


def run(argv, *scores):
    """Run with evaluations that find these values, one after the other."""
    runner, left = make_runner(argv), list(scores)
    runner.trainer.evaluator = lambda encoder: dict.fromkeys(DEV_METRICS, left.pop(0))
    result = runner.run()
    assert not left
    return result


def dense(folder):
    encoder = Encoder.load(folder, device="cpu")
    return merge_experts(encoder).model.state_dict() if encoder.model.config.to_dict().get("moe") else weights(folder)


def weights(folder):
    return Encoder.load(folder, device="cpu").model.state_dict()


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("merges", [False, True])
def test_where_no_candidate_beats_the_base_model_the_folder_holds_it(argv, tiny_encoder, tmp_path, merges):
    # The base model, the checkpoint; the checkpoint with its experts merged.
    more = {"merge_experts": merges}
    result = run(argv(**more), 0.9, 0.5, *([0.8] if merges else []))
    folder, base = result.folder, Encoder.load(tiny_encoder, device="cpu")
    assert result.alpha == 0
    assert result.before == result.after == dict.fromkeys(DEV_METRICS.values(), 0.9)
    found = Encoder.load(folder, device="cpu")
    assert has_experts(found.model) is not merges
    torch.testing.assert_close(found.encode_queries(TEXTS), base.encode_queries(TEXTS))
    if merges:
        assert all(torch.equal(value, weights(tiny_encoder)[name]) for name, value in weights(folder).items())
    place = folder / ("experts" if merges else "checkpoint-1")
    trained, checkpoint = (load_file(one / "model.safetensors") for one in (place, folder / "checkpoint-1"))
    assert all(torch.equal(value, trained[name]) for name, value in checkpoint.items())
    assert not all(torch.equal(value, load_file(folder / "model.safetensors").get(n)) for n, value in trained.items())
    assert result.best_checkpoint == folder / "checkpoint-1"
    assert f"saved to {folder}: the base model, as no candidate is better" in str(result)
    assert f"{folder} holds the base model, {place} the trained one." in str(result)
    assert "as it was: fine-tuning with" in (folder / "README.md").read_text()
    assert json.loads((folder / "merge.json").read_text())["alpha"] == 0

    before = contents(folder)
    again = run([*argv(**more), "--resume_from_checkpoint", "true"], *([0.8] if merges else []))  # it is over
    assert str(again) == str(result)
    assert contents(folder) == before


def test_a_tie_is_no_gain(argv):
    assert run(argv(), 0.5, 0.5).alpha == 0
    assert (make_runner(argv(output_dir="other")).plan.training_args.base_counts) is True


def test_the_best_mixture_of_merged_experts_is_kept(argv, tiny_encoder, tmp_path):
    # The base model, the checkpoint; the mixtures of its experts, merged; its experts, merged.
    options = argv(merge_experts=True, merge_base_alpha=[0.25, 0.75])
    plan = str(make_runner(options).plan)
    assert "mixing          trained weights with the base model's, alpha 0.25 or 0.75, or not at all" in plan
    result = run(options, 0.5, 0.6, 0.7, 0.4, 0.55)
    folder = result.folder
    assert {alpha: found["nDCG@10"] for alpha, found in result.candidates.items()} == {
        0: 0.5,
        0.25: 0.7,
        0.75: 0.4,
        1: 0.55,
    }
    figures = (result.before, result.with_experts, result.after)
    assert (result.alpha, *(found["nDCG@10"] for found in figures)) == (0.25, 0.5, 0.6, 0.7)
    base, trained = weights(tiny_encoder), dense(folder / "checkpoint-1")
    for name, value in weights(folder).items():
        torch.testing.assert_close(value, 0.75 * base[name] + 0.25 * trained[name])
    table = [line[:10].strip() for line in str(result).splitlines()[3:]]
    assert table == ["before", "experts", "alpha 0.25", "alpha 0.75", "merged", "12 dev que", "Next: pyth"]
    mixed = "the model with its experts merged, mixed with its base model (alpha 0.25), its card"
    assert f"saved to {folder}: {mixed}" in str(result)
    assert "| after training, mixed with the base model | 0.7000 |" in (folder / "README.md").read_text()
    assert json.loads((folder / "merge.json").read_text())["alpha"] == 0.25

    before = contents(folder)
    again = run([*options, "--resume_from_checkpoint", "true"], 0.7, 0.4, 0.55)
    assert str(again) == str(result)
    assert contents(folder) == before


def test_the_best_mixture_is_kept(argv, tiny_encoder):
    # The base model, the checkpoint; its mixtures.
    result = run(argv(merge_base_alpha=[0.25, 0.75]), 0.5, 0.6, 0.5, 0.8)
    assert (result.alpha, result.after["nDCG@10"]) == (0.75, 0.8)
    base, trained = weights(tiny_encoder), dense(result.folder / "checkpoint-1")
    for name, value in dense(result.folder).items():
        torch.testing.assert_close(value, 0.25 * base[name] + 0.75 * trained[name])
    assert [line[:10].strip() for line in str(result).splitlines()[2:6]] == [
        "before",
        "alpha 0.25",
        "alpha 0.75",
        "trained",
    ]
    assert f"saved to {result.folder}: the model, mixed with its base model (alpha 0.75), its card" in str(result)


def test_without_a_collection_one_share_is_taken(argv, tiny_encoder, tmp_path):
    none = {"dev_collection": None, "dev_language": None}
    words = argv(**none, num_experts=0, trainable="full", merge_base_alpha=[0.25])
    result = train(**dict(zip((name.removeprefix("--") for name in words[::2]), words[1::2])))
    assert (result.alpha, result.candidates) == (0.25, {})
    base, trained = weights(tiny_encoder), weights(result.folder / "checkpoint-1")
    for name, value in weights(result.folder).items():
        torch.testing.assert_close(value, 0.75 * base[name] + 0.25 * trained[name])
    words = argv(**none, output_dir=tmp_path / "two", merge_base_alpha=[0.25, 0.5])
    with pytest.raises(UserError, match="merge_base_alpha: found several, expected one, or dev_collection"):
        make_runner(words)


def test_weights_that_lie_nowhere_else_stay(argv):
    result = run(argv(save_strategy="no", eval_strategy="steps", eval_steps=1), 0.9, 0.5)
    assert (result.alpha, result.after["nDCG@10"]) == (1, 0.5)
    assert "holds the base model" not in str(result)
    assert "nDCG@10 0.9000 before, 0.5000 after" in str(result.verdict)


def test_the_base_model_can_be_left_out(argv):
    result = run(argv(eval_on_start=False), 0.5)
    assert (result.alpha, result.before, result.verdict) == (1, None, None)
    assert [record["step"] for record in read_metrics(result.folder) if "eval_ndcg@10" in record] == [1]
    assert "base model where none beats it" not in str(result.plan)


def test_an_adapter_is_mixed_as_an_adapter(argv, tiny_encoder):
    result = run(argv(trainable="lora", merge_base_alpha=[0.25]), 0.5, 0.6, 0.7)
    folder, base = result.folder, weights(tiny_encoder)
    assert (result.alpha, (folder / "config.json").exists()) == (0.25, False)
    trained = dense(folder / "checkpoint-1")
    assert any((trained[name] - value).abs().max() > 1e-3 for name, value in base.items() if name in trained)
    for name, value in dense(folder).items():
        torch.testing.assert_close(value, 0.75 * base[name] + 0.25 * trained[name])


def test_a_run_that_goes_on_in_another_folder_has_its_best_checkpoint_where_it_was(argv, tmp_path):
    run(argv(max_steps=2), 0.5, 0.9, 0.4)
    first = ["--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-1"), "--output_dir", str(tmp_path / "new")]
    result = run([*argv(max_steps=2), *first], 0.3)
    assert (result.best_checkpoint, result.alpha) == (tmp_path / "run" / "checkpoint-1", 1)
    assert {share: metrics["nDCG@10"] for share, metrics in result.candidates.items()} == {0: 0.5, 1: 0.9}
    assert (
        contents(tmp_path / "new")[Path("model.safetensors")]
        == contents(result.best_checkpoint)[Path("model.safetensors")]
    )
    again = ["--resume_from_checkpoint", "true", "--output_dir", str(tmp_path / "new")]
    assert run([*argv(max_steps=2), *again]).best_checkpoint == result.best_checkpoint


def test_of_several_languages_the_means_decide(argv, tmp_path):
    (make_collection(tmp_path / "other", 5) / "ko").rename(tmp_path / "fa")
    languages = {"ko": "ko", "fa": "fa", "both": ["ko", "fa"]}
    words = {name: argv(dev_language=language) for name, language in languages.items()}
    (tmp_path / "fa").rename(tmp_path / "dev" / "fa")
    runners = {name: make_runner(given) for name, given in words.items()}
    found = {name: runner.trainer.evaluator(runner.encoder) for name, runner in runners.items()}
    for name, value in found["both"].items():
        assert value == pytest.approx((found["ko"][name] + found["fa"][name]) / 2)
    assert found["ko"]["ndcg@10"] != found["fa"]["ndcg@10"]
    assert "17 queries, 17 passages" in str(runners["both"].plan)
    assert "languages ko, fa; the best" in str(runners["both"].plan)
    assert runners["ko"].training_args.dev_language == "ko"  # as in configs of before
