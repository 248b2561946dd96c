"""What a user would otherwise do: sentence-transformers' own trainer on the same mined files, tuned the same way.

    python configs/study/sentence_transformers_rows.py TRAIN.jsonl COLLECTION LANGUAGE OUTPUT.jsonl [--steps N]
    python configs/study/sentence_transformers_rows.py TRAIN.jsonl COLLECTION LANGUAGE OUTPUT.jsonl --final --steps N
    python configs/study/sentence_transformers_rows.py TRAIN.jsonl COLLECTION LANGUAGE OUTPUT.jsonl --final --seconds S

`mnrl` is MultipleNegativesRankingLoss with four hard negatives at batch 8, `cached` its cached form at batch 64 for as many
tokens. All weights are trained, and, as `_upper`, the upper four layers only. Each loss is tried with learning rates and
temperatures with one seed; the best on dev runs with five. `--final` instead trains in the way that was best on dev of
KorQuAD and PQuAD, on passages of up to 512 tokens, and evaluates on `test`: for as many steps as are given, or as fit into so
many seconds by the time of a few steps before. A JSON object a line: loss, setting, seed, metrics, seconds, and the value of
each query. Runs whose line is there are not repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers import losses as st
from transformers import TrainerCallback

from clpl_moe.encoder import Encoder
from clpl_moe.encoder.precision import fast_bfloat16
from clpl_moe.evaluate.evaluation import evaluate_retrieval
from clpl_moe.retrieval.collection import Collection
from clpl_moe.retrieval.options import EncodingArguments

MODEL = "models/small-encoder"
NEGATIVES, STEPS = 4, 100
RATES, TEMPERATURES = (2e-5, 6e-5, 1.2e-4), (0.005, 0.015)
# Best mean of KorQuAD and PQuAD, of all settings with one seed: benchmarks/results/study_sentence_transformers.json.
FINAL = ("mnrl", 2e-5, 0.005)
METRICS = ("nDCG@5", "nDCG@10", "RR@10", "R@20")
SEEDS = (11, 12, 13, 14, 15)


def read(path: Path) -> Dataset:
    """Columns of a mined file: anchor, positive, and the first negatives, those of short lists again."""
    rows = []
    for text in path.open(encoding="utf-8"):
        line = json.loads(text)
        negatives = [line["neg"][number % len(line["neg"])] for number in range(NEGATIVES)]
        row = {"anchor": "query: " + line["query"], "positive": "passage: " + line["pos"][0]}
        rows.append(row | {f"negative_{n}": f"passage: {text}" for n, text in enumerate(negatives, 1)})
    return Dataset.from_list(rows)


class StepEnds(TrainerCallback):
    """Notes when steps end."""

    def __init__(self, ends: list[float]) -> None:
        self.ends = ends

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(time.perf_counter())


def train(
    data: Dataset,
    kind: str,
    rate: float,
    temperature: float,
    seed: int,
    steps: int,
    length: int,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[Any, float]:
    model = SentenceTransformer(MODEL)
    model.max_seq_length = length
    if kind.endswith("_upper"):
        encoder = model[0].auto_model
        for module in (encoder.embeddings, *encoder.encoder.layer[:8]):
            module.requires_grad_(False)
    cached = kind.startswith("cached")
    if cached:
        loss: Any = st.CachedMultipleNegativesRankingLoss(model, scale=1 / temperature, mini_batch_size=32)
        steps = max(1, steps * 8 // 64)
    else:
        loss = st.MultipleNegativesRankingLoss(model, scale=1 / temperature)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=64 if cached else 8,
            learning_rate=rate,
            warmup_steps=max(1, steps // 10),
            weight_decay=0.01,
            bf16=fast_bfloat16(model.device),
            use_cpu=not torch.cuda.is_available(),
            seed=seed,
            save_strategy="no",
            report_to="none",
            logging_steps=50,
            disable_tqdm=True,
        )
        started = time.perf_counter()
        trainer = SentenceTransformerTrainer(model, arguments, train_dataset=data, loss=loss, callbacks=[*callbacks])
        trainer.train()
        seconds = time.perf_counter() - started
    return model[0].auto_model, seconds


def step_seconds(data: Dataset, kind: str, length: int) -> float:
    """The median of some steps; the first ones are slower."""
    ends: list[float] = []
    train(data, kind, 0.0, 1.0, 0, 8, length, [StepEnds(ends)])
    return statistics.median(after - before for before, after in itertools.pairwise(ends[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("collection", type=Path)
    parser.add_argument("language")
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--final", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    arguments = parser.parse_args()
    language, output, steps, budget = arguments.language, arguments.output, arguments.steps, arguments.seconds
    split, length = ("test", 512) if arguments.final else ("dev", 256)
    data, collection = read(arguments.file), Collection.load(arguments.collection, language, split)
    encoder = Encoder.load(MODEL, compute_dtype=torch.bfloat16 if arguments.final else torch.float32)
    encoding = EncodingArguments(64, 512)
    lines = [json.loads(line) for line in output.open(encoding="utf-8")] if output.exists() else []

    def run(kind: str, rate: float, temperature: float, seed: int) -> float:
        key = {"loss": kind, "learning_rate": rate, "temperature": temperature, "seed": seed, "language": language}
        key |= {"split": split} | ({"budget": budget} if budget else {"steps": steps})
        for line in lines:
            if key.items() <= line.items():
                return line["metrics"]["nDCG@5"]
        fit = max(1, int(budget / step_seconds(data, kind, length))) if budget else steps
        model, seconds = train(data, kind, rate, temperature, seed, fit, length)
        encoder.model.load_state_dict(model.state_dict(), strict=False)
        result = evaluate_retrieval(encoder, collection, encoding, top_k=100, metrics=METRICS, progress=False)
        queries = {query: round(values["nDCG@5"], 4) for query, values in result.per_query.items()}
        line = key | {"steps": fit, "metrics": result.metrics, "seconds": round(seconds, 1), "queries": queries}
        lines.append(line)
        with output.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(line) + "\n")
        return result.metrics["nDCG@5"]

    if arguments.final:
        for seed in arguments.seeds:
            run(*FINAL, seed)
        return
    for kind in ("mnrl_upper", "mnrl", "cached_upper"):
        settings = list(itertools.product(RATES, TEMPERATURES))
        best = max(settings, key=lambda setting: run(kind, *setting, 1))
        for seed in arguments.seeds:
            run(kind, *best, seed)


if __name__ == "__main__":
    main()
