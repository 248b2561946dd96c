"""Which weights a run's folder keeps: the trained ones, the base model's, or weights between both."""

import json

import pytest
import torch
from safetensors.torch import load_file

from clpl_moe.common.errors import UserError
from clpl_moe.encoder import Encoder
from clpl_moe.moe.inject import merge_experts
from clpl_moe.train import train
from clpl_moe.train.options import DEV_METRICS
from helpers.tiny_training import arguments, make_collection, make_runner, read_metrics, write_triplets


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


def test_where_no_checkpoint_beats_the_base_model_the_folders_hold_it(argv, tiny_encoder, tmp_path):
    # The base model, the checkpoint; the checkpoint with its experts merged.
    result = run(argv(merge_experts=True), 0.9, 0.5, 0.8)
    folder, base = result.folder, Encoder.load(tiny_encoder, device="cpu")
    assert (result.alpha, result.alpha_of_merged) == (0, 0)
    assert result.before == result.after == result.after_merging == dict.fromkeys(DEV_METRICS.values(), 0.9)
    texts = ["abc def", "ghi"]
    for kept in (folder, folder / "merged"):
        found = Encoder.load(kept, device="cpu")
        assert torch.equal(found.encode_queries(texts), base.encode_queries(texts))
    assert all(torch.equal(value, weights(tiny_encoder)[name]) for name, value in weights(folder / "merged").items())
    trained = load_file(folder / "checkpoint-1" / "model.safetensors")
    assert not all(torch.equal(value, trained[name]) for name, value in weights(folder).items())
    assert result.best_checkpoint == folder / "checkpoint-1"
    assert f"saved to {folder}: the base model, as no checkpoint is better" in str(result)
    assert f"{folder} holds the base model, {folder / 'checkpoint-1'} the trained one." in str(result)
    assert "as it was: fine-tuning with" in (folder / "README.md").read_text()
    assert json.loads((folder / "merge.json").read_text())["alpha"] == 0

    before = contents(folder)
    again = run([*argv(merge_experts=True), "--resume_from_checkpoint", "true"], 0.8)  # it is over
    assert str(again) == str(result)
    assert contents(folder) == before


def test_a_tie_is_no_gain(argv):
    assert run(argv(), 0.5, 0.5).alpha == 0
    assert (make_runner(argv(output_dir="other")).plan.training_args.base_counts) is True


def test_where_merging_alone_helps_the_merged_model_is_the_next_one(argv):
    result = run(argv(merge_experts=True), 0.5, 0.4, 0.6)
    assert (result.alpha, result.alpha_of_merged, result.verdict) == (0, 1, None)
    assert f" {result.folder / 'merged'} --collection" in result.next_command()


def test_the_best_mixture_is_kept_also_of_merged_experts(argv, tiny_encoder, tmp_path):
    # The base model, the checkpoint; its mixtures; the merged checkpoint's, and the merged checkpoint.
    options = argv(merge_experts=True, merge_base_alpha=[0.25, 0.75])
    plan = str(make_runner(options).plan)
    assert "mixing          trained weights with the base model's, alpha 0.25 or 0.75, or not at all" in plan
    result = run(options, 0.5, 0.6, 0.5, 0.8, 0.7, 0.6, 0.5)
    folder = result.folder
    assert (result.alpha, result.alpha_of_merged) == (0.75, 0.25)
    assert {alpha: found["nDCG@10"] for alpha, found in result.candidates.items()} == {
        0: 0.5,
        0.25: 0.5,
        0.75: 0.8,
        1: 0.6,
    }
    assert (result.before["nDCG@10"], result.after["nDCG@10"], result.after_merging["nDCG@10"]) == (0.5, 0.8, 0.7)
    base, trained = weights(tiny_encoder), dense(folder / "checkpoint-1")
    for kept, alpha in ((folder, 0.75), (folder / "merged", 0.25)):
        for name, value in dense(kept).items():
            torch.testing.assert_close(value, (1 - alpha) * base[name] + alpha * trained[name])
    assert [line.split()[0] for line in str(result).splitlines()[3:9]] == [
        "before",
        "alpha",
        "alpha",
        "trained",
        "merged",
        "Next:",
    ]
    assert f"saved to {folder}: the model, mixed with its base model (alpha 0.75), its card" in str(result)
    assert "| after training, mixed with the base model | 0.8000 |" in (folder / "README.md").read_text()
    assert json.loads((folder / "merged/merge.json").read_text())["alpha"] == 0.25

    before = contents(folder)
    again = run([*options, "--resume_from_checkpoint", "true"], 0.5, 0.8, 0.7, 0.6, 0.5)
    assert str(again) == str(result)
    assert contents(folder) == before


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
