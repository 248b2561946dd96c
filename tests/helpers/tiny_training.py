"""Training runs that take a second: made-up triplets, a tiny model, and a way to stop a run where one wants."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from clpl_moe.common.files import write_jsonl


def make_triplets(count: int = 24, negatives: int = 4, seed: int = 0, **fields) -> list[dict]:
    """Made-up training lines; negatives answer 0, 1 or 2 queries each, in all spellings of ``neg_q``."""
    rng = random.Random(seed)

    def text(words: int) -> str:
        return " ".join("".join(rng.choices("abcdefghij", k=rng.randint(2, 5))) for _ in range(words))

    return [
        {
            "query": text(3),
            "pos": [text(6) for _ in range(1 + index % 2)],
            "neg": [text(rng.randint(3, 8)) for _ in range(negatives)],
            "neg_q": [rng.choice([None, [], text(3), [text(2), text(4)]]) for _ in range(negatives)],
            **fields,
        }
        for index in range(count)
    ]


def write_triplets(path: Path, *args, **options) -> Path:
    """Write :func:`make_triplets` to a file."""
    write_jsonl(path, make_triplets(*args, **options))
    return path


def make_collection(folder: Path, count: int = 12) -> Path:
    """A collection whose queries are parts of their passages."""
    texts = [line["pos"][0] for line in make_triplets(count, seed=7)]
    language = folder / "ko"
    write_jsonl(language / "corpus.jsonl", ({"id": f"p{i}", "text": t} for i, t in enumerate(texts)))
    write_jsonl(language / "dev_queries.jsonl", ({"id": f"q{i}", "text": t[:12]} for i, t in enumerate(texts)))
    write_jsonl(
        language / "dev_qrels.jsonl",
        ({"qid": f"q{i}", "docid": f"p{i}", "relevance": 1} for i in range(count)),
    )
    return folder


def write_dev_lines(path: Path, count: int = 12) -> Path:
    """Training lines of the queries that :func:`make_collection` judges: a run on them beats its base model."""
    passages = [line["pos"][0] for line in make_triplets(count, seed=7)]
    negatives = [passages[place:] + passages[:place] for place in (1, 5)]
    write_jsonl(
        path,
        (
            {"query": text[:12], "pos": [text], "neg": others, "neg_q": [other[:12] for other in others]}
            for text, *others in zip(passages, *negatives)
        ),
    )
    return path


def arguments(model: Path, data: Path | list[Path], output: Path, **options) -> list[str]:
    """The command line of a short run; options given as None are left out."""
    values = {
        "model_name_or_path": model,
        "train_data": data,
        "output_dir": output,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "train_group_size": 3,
        "query_max_len": 24,
        "passage_max_len": 40,
        "queries_per_negative": 2,
        "learning_rate": 1e-3,
        "temperature": 0.1,
        # Of the whole model, and evaluated as trained, unless a test is about the recipe.
        "trainable": "moe",
        "moe_target": "intermediate",
        "moe_layers": "all",
        "frozen_layers": 0,
        "penalty": "cosine",
        "penalty_weight": 0.1,
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "merge_experts": False,
        "merge_base_alpha": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,  # the same figures on every machine
        "disable_tqdm": True,
        "cache_path": output.parent / "cache",
    } | options
    argv = []
    for name, value in values.items():
        if value is not None:
            argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return argv


def make_runner(argv: list[str]):
    """The runner that ``clpl_moe.train`` would build."""
    from clpl_moe.common.cli import parse
    from clpl_moe.train.arguments import CLPLDataArguments, CLPLModelArguments, CLPLTrainingArguments
    from clpl_moe.train.runner import CLPLRunner

    return CLPLRunner(*parse([CLPLModelArguments, CLPLDataArguments, CLPLTrainingArguments], "test", "", argv))


class Stopped(Exception):
    """Raised in place of a training step."""


def train_until(argv: list[str], call: int) -> None:
    """Train, but stop before the given forward and backward pass (from 1), as a crash would."""
    runner = make_runner(argv)
    step, calls = runner.trainer.training_step, 0

    def training_step(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            raise Stopped
        return step(*args, **kwargs)

    runner.trainer.training_step = training_step
    try:
        runner.run()
    except Stopped:
        return
    raise AssertionError("the run ended before it was to be stopped")


def read_metrics(folder: Path) -> list[dict]:
    """The records of a run's ``metrics.jsonl``."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def refused(argv, capsys) -> str:
    """What a training command that refuses writes to stderr: exit code 2, no traceback."""
    from clpl_moe.train.__main__ import main

    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err
