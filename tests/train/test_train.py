"""Training from Python, and what the command prints."""

import inspect
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel, XLMRobertaModel
from transformers.trainer import PrinterCallback
from transformers.trainer_callback import TrainerCallback

from clpl_moe import load_encoder, merge_experts
from clpl_moe.common.errors import UserError
from clpl_moe.evaluate import evaluate
from clpl_moe.train import TrainResult, train
from helpers.tiny_training import arguments, make_collection, make_runner, read_metrics, write_dev_lines, write_triplets


@pytest.fixture
def options(tiny_encoder, tmp_path):
    """The options of a short run, as keyword arguments."""
    argv = arguments(tiny_encoder, write_triplets(tmp_path / "train.jsonl", 8), tmp_path / "run", max_steps=2)
    return dict(zip((name.removeprefix("--") for name in argv[::2]), argv[1::2]))


def test_the_function_trains_and_returns_what_it_made(options, tmp_path, capsys):
    dev = make_collection(tmp_path / "dev")
    result = train(**options | {"save_strategy": "steps"}, save_steps=2, dev_collection=dev, dev_language="ko")
    assert isinstance(result, TrainResult)
    assert result.folder == tmp_path / "run"
    assert (result.folder / "model.safetensors").is_file()
    assert result.best_checkpoint == result.folder / "checkpoint-2"
    records = [record for record in read_metrics(result.folder) if "eval_ndcg@10" in record]
    assert result.before["nDCG@10"] == records[0]["eval_ndcg@10"]
    assert result.candidates[1]["nDCG@10"] == records[-1]["eval_ndcg@10"]
    assert result.after["nDCG@10"] == max(record["eval_ndcg@10"] for record in records)
    assert result.metrics_file.read_text().count("\n") == len(read_metrics(result.folder))
    assert result.plan.steps == 2
    assert all(line.startswith("step ") for line in capsys.readouterr().out.splitlines())


def test_arguments_go_over_the_config(options, tmp_path):
    del options["penalty_weight"]
    (tmp_path / "c.yaml").write_text("penalty_weight: 0.3\nlearning_rate: 1.0e-6\n")
    plan = train(config=tmp_path / "c.yaml", **options | {"dry_run": True, "learning_rate": 1e-4})
    assert (plan.training_args.penalty_weight, plan.training_args.learning_rate) == (0.3, 1e-4)
    assert not (tmp_path / "run").exists()


def test_without_evaluation_there_are_no_metrics(options):
    result = train(**options)
    assert (result.before, result.after, result.best_checkpoint) == (None, None, None)
    assert "--collection COLLECTIONS --languages LANGUAGE" in result.next_command()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"learning_rte": 1}, "train(): unknown argument 'learning_rte'; did you mean 'learning_rate'?"),
        ({"temperature": "hot"}, "'temperature': found 'hot', expected a number"),
        ({"train_data": None}, "train_data is missing"),
        (
            {"ance_refresh": "epoch", "ance_collection": "c", "ance_language": "ko", "ance_rank_from": 0},
            "ance_rank_from",
        ),
    ],
)
def test_mistakes_are_user_errors(options, tmp_path, more, message):
    with pytest.raises(UserError) as error:
        train(**options | more)
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_the_signature_shows_own_options(options):
    parameters = inspect.signature(train).parameters
    assert parameters["penalty_weight"].default == 0.8
    assert parameters["options"].kind is inspect.Parameter.VAR_KEYWORD
    assert "penalty_weight: " in train.__doc__


def test_options_without_effect_are_named_in_one_line_and_ignored(options, caplog):
    plan = train(
        **options, dry_run=True, use_fast_tokenizer=False, per_device_eval_batch_size=3, include_for_metrics=["inputs"]
    )
    (record,) = [record for record in caplog.records if "without any effect" in record.message]
    for name in ("use_fast_tokenizer", "per_device_eval_batch_size", "include_for_metrics"):
        assert name in record.message
    assert plan.training_args.per_device_eval_batch_size == 8
    caplog.clear()
    train(**options, dry_run=True, do_train=True, use_fast_tokenizer=True)
    assert not [record for record in caplog.records if "without any effect" in record.message]


def test_no_callback_of_transformers_shows_progress_beside_the_own_one(options, monkeypatch):
    """In a notebook transformers takes another one than on a console."""

    class Notebook(TrainerCallback):
        pass

    for place in ("transformers.trainer", "clpl_moe.train.trainer"):
        monkeypatch.setattr(f"{place}.DEFAULT_PROGRESS_CALLBACK", Notebook)
    argv = [word for name, value in (options | {"disable_tqdm": False}).items() for word in (f"--{name}", str(value))]
    callbacks = make_runner(argv).trainer.callback_handler.callbacks
    assert not any(isinstance(callback, (Notebook, PrinterCallback)) for callback in callbacks)


def test_what_the_command_prints(tiny_encoder, tmp_path):
    """The plan first and the next command last, and no line of a dependency."""
    data, dev = write_dev_lines(tmp_path / "train.jsonl"), make_collection(tmp_path / "dev")
    argv = arguments(
        tiny_encoder, data, tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=2, learning_rate=1e-2,
        dev_collection=dev, dev_language="ko", disable_tqdm=False, use_cpu=True,
    )  # fmt: skip
    command = [sys.executable, "-m", "clpl_moe.train", *argv]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    names = [
        "base model",
        "experts",
        "parameters",
        "examples",
        "lengths",
        "batch",
        "steps",
        "loss",
        "device",
        "evaluation",
    ]
    assert [line[:16].strip() for line in lines[: len(names) + 1]] == [*names, "output"]
    assert "12 queries, 12 passages" in lines[9]
    after = [record["eval_ndcg@10"] for record in read_metrics(tmp_path / "run") if "eval_ndcg@10" in record]
    assert [line.split()[0] for line in lines[-4:-2]] == ["before", "after"]
    assert lines[-2].startswith("12 dev questions are few, and they chose the best candidate: the gain may be chance.")
    assert [float(line.split()[2]) for line in lines[-4:-2]] == pytest.approx([after[0], after[-1]], abs=5e-5)
    assert after[-1] > after[0]
    following = lines[-1].removeprefix("Next: python -m clpl_moe.evaluate ").split()
    assert following[:3] == ["--model", str(tiny_encoder), str(tmp_path / "run")]
    assert following[following.index("--collection") + 1] == str(dev)
    # On stderr there is the bar of the training only.
    shown = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()]
    assert all("/2 [" in line for line in shown), shown


def test_merged_experts_are_the_run_s_model(options, tmp_path):
    dev = make_collection(tmp_path / "dev")
    more = {"num_experts": 3, "learning_rate": 0.1, "merge_experts": True, "save_strategy": "steps", "save_steps": 2}
    more |= {"eval_on_start": False}  # or the base model would be the best
    result = train(**options | more, dev_collection=dev, dev_language="ko")
    folder = result.folder
    assert result.experts == folder / "experts"
    expected = merge_experts(load_encoder(result.experts)[0]).state_dict()
    model = AutoModel.from_pretrained(folder)  # no code of the folder
    assert type(model) is XLMRobertaModel
    assert not list(folder.glob("*.py"))
    found = model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    evaluation = evaluate(
        model=[str(folder)],
        collection=str(dev),
        languages=["ko"],
        output=str(tmp_path / "results"),
        query_max_len=24,
        passage_max_len=40,
        dtype="float32",
    )
    assert result.after["nDCG@10"] == pytest.approx(evaluation.results[0].metrics["nDCG@10"])
    in_training = [record["eval_ndcg@10"] for record in read_metrics(folder) if "eval_ndcg@10" in record]
    assert result.with_experts["nDCG@10"] == in_training[-1]
    assert [line.split()[0] for line in str(result).splitlines()[-3:-1]] == ["experts", "merged"]
    assert f"saved to {folder}: the model with its experts merged, its card" in str(result)
    assert f"saved to {result.experts}: the trained model with its experts" in str(result)
    assert ", merged at the end" in str(result.plan)
    card = (folder / "README.md").read_text()
    assert "merged after training: this model is dense" in card
    assert "trust_remote_code" not in card


def test_without_experts_there_is_nothing_to_merge(options, tmp_path):
    with pytest.raises(UserError, match="merge_experts: found no experts to merge, expected num_experts above 0"):
        train(**options | {"num_experts": 0, "merge_experts": True})
    assert not (tmp_path / "run").exists()
