"""How many examples a second does training take? This package beside FlagEmbedding's and sentence-transformers' trainers.

``python benchmarks/training.py --model models/small-encoder``

All train the same model on the same queries, positives and negatives with the same batches, lengths, precision and
optimizer, each through its own trainer, tokenisation included. Each round starts a fresh process for every contender; within
it, the time of a step is taken from the end of one optimizer step to the end of the next, and the first ones are left out.
Where other work shares the cores, the processor time is the figure to compare.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from common import (
    alternate,
    benchmark_parser,
    in_fresh_process,
    peak_memory,
    pick_device,
    pick_precision,
    reset_peak_memory,
    summary,
    synchronize,
    write_result,
)

CONTENDERS = {
    "clpl_moe, contrastive, dense, all trained": {"num_experts": 0, "trainable": "full", "penalty_weight": 0.0},
    "FlagEmbedding M3": "flagembedding",
    "sentence-transformers MNRL": "MultipleNegativesRankingLoss",
    "clpl_moe, the same with gradient caching": {
        "num_experts": 0,
        "trainable": "full",
        "penalty_weight": 0.0,
        "grad_cache_tokens": "chunk",
    },
    "sentence-transformers CachedMNRL": "CachedMultipleNegativesRankingLoss",
    "clpl_moe, CLPL, only experts trained": {"num_experts": 2, "trainable": "moe", "penalty_weight": 0.1},
}


def training_parser(description: str, output: str, **defaults: int) -> argparse.ArgumentParser:
    """What the benchmarks that train in fresh processes are asked, with defaults for the numbers."""
    parser = benchmark_parser(description, output)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, default=Path("data/samples/ko/train.jsonl"), help="training JSONL")
    parser.add_argument("--group", type=int, help="passages a query")
    parser.add_argument("--query_max_len", type=int, help="tokens")
    parser.add_argument("--passage_max_len", type=int, help="tokens")
    parser.add_argument("--rounds", type=int, help="runs of each contender")
    parser.set_defaults(**defaults)
    return parser


def write_data(source: Path, folder: Path, model: str, count: int, negatives: int, query_max_len: int) -> Path:
    """``count`` examples with one positive and ``negatives`` negatives each, so that nothing is left to be drawn. Queries
    are cut to length, since sentence-transformers knows one length for all texts."""
    from transformers import AutoTokenizer

    from clpl_moe.data.schema import negative_queries

    tokenizer = AutoTokenizer.from_pretrained(model)
    lines = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    lines = [line for line in lines if len(line["neg"]) >= negatives]
    if not lines:
        raise SystemExit(f"{source}: no line has {negatives} negatives")
    random.Random(0).shuffle(lines)
    path = folder / "train.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            line = lines[number % len(lines)]
            # Room for the two special tokens and the prompt.
            ids = tokenizer(line["query"], add_special_tokens=False)["input_ids"][: query_max_len - 8]
            record = {
                "query": tokenizer.decode(ids),
                "pos": line["pos"][:1],
                "neg": line["neg"][:negatives],
                "neg_q": [queries[:1] for queries in negative_queries(line)[:negatives]],
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return path


def step_timer(device: str):
    """A callback of transformers' Trainer that keeps when each optimizer step ended."""
    from transformers import TrainerCallback

    class StepTimer(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []
            self.processor_ends: list[float] = []

        def on_step_end(self, args, state, control, **kwargs):
            synchronize(device)
            self.ends.append(time.perf_counter())
            self.processor_ends.append(time.process_time())

        def seconds(self, warmup: int, processor: bool = False) -> list[float]:
            """Of each step after the first ``warmup``, at least 1: from the end of the one before to its own; ``processor``: of
            this process only, which other work on the machine changes less."""
            ends = self.processor_ends if processor else self.ends
            return [after - before for before, after in itertools.pairwise(ends[warmup - 1 :])]

    return StepTimer()


def common_arguments(job: dict[str, Any], output: str) -> dict[str, Any]:
    """What transformers' Trainer is told by every contender."""
    return {
        "output_dir": output,
        "per_device_train_batch_size": job["batch"],
        "max_steps": job["steps"],
        "learning_rate": 1e-5,
        "use_cpu": job["device"] == "cpu",
        # Texts are tokenised beside the training; on a CPU that would take its cores.
        "dataloader_num_workers": 0 if job["device"] == "cpu" else 4,
        "bf16": job["precision"] == "bf16",
        "fp16": job["precision"] == "fp16",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def train_ours(job: dict[str, Any], folder: str, timer):
    """This package's trainer, returned when it has trained."""
    from clpl_moe.train.arguments import CLPLDataArguments, CLPLModelArguments, CLPLTrainingArguments
    from clpl_moe.train.runner import CLPLRunner

    # The recipe freezes the lower layers, which the other trainers train.
    options = {"frozen_layers": 0} | job["contender"]
    if options.get("grad_cache_tokens") == "chunk":
        options["grad_cache_tokens"] = job["chunk"] * job["passage_max_len"]
    runner = CLPLRunner(
        CLPLModelArguments(model_name_or_path=job["model"], num_experts=options.pop("num_experts")),
        CLPLDataArguments(
            train_data=[job["data"]],
            train_group_size=job["group"],
            query_max_len=job["query_max_len"],
            passage_max_len=job["passage_max_len"],
            queries_per_negative=1 if options["penalty_weight"] else 0,
            cache_path=f"{folder}/cache",
        ),
        CLPLTrainingArguments(
            temperature=0.02, sentence_pooling_method="mean", **options, **common_arguments(job, f"{folder}/run")
        ),
    )
    Path(folder, "run").mkdir(exist_ok=True)
    runner.trainer.add_callback(timer)
    reset_peak_memory(job["device"])
    runner.trainer.train()
    return runner.trainer


def train_flagembedding(job: dict[str, Any], folder: str, timer) -> None:
    """What ``python -m FlagEmbedding.finetune.embedder.encoder_only.m3`` does, with a callback added."""
    from FlagEmbedding.finetune.embedder.encoder_only.m3 import (
        EncoderOnlyEmbedderM3DataArguments,
        EncoderOnlyEmbedderM3ModelArguments,
        EncoderOnlyEmbedderM3Runner,
        EncoderOnlyEmbedderM3TrainingArguments,
    )

    query_prompt, passage_prompt = job["prompts"]
    runner = EncoderOnlyEmbedderM3Runner(
        EncoderOnlyEmbedderM3ModelArguments(model_name_or_path=job["model"]),
        EncoderOnlyEmbedderM3DataArguments(
            train_data=[job["data"]],
            train_group_size=job["group"],
            query_max_len=job["query_max_len"],
            passage_max_len=job["passage_max_len"],
            query_instruction_for_retrieval=query_prompt or None,
            passage_instruction_for_retrieval=passage_prompt or None,
            cache_path=f"{folder}/cache",
        ),
        EncoderOnlyEmbedderM3TrainingArguments(
            temperature=0.02, sentence_pooling_method="mean", **common_arguments(job, f"{folder}/run")
        ),
    )
    runner.trainer.add_callback(timer)
    reset_peak_memory(job["device"])
    runner.trainer.train()


def train_sentence_transformers(job: dict[str, Any], folder: str, timer) -> None:
    """``SentenceTransformerTrainer`` with a loss of its own."""
    import datasets
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
        losses,
    )

    lines = [json.loads(line) for line in Path(job["data"]).read_text(encoding="utf-8").splitlines()]
    query_prompt, passage_prompt = job["prompts"]
    columns = {
        "anchor": [query_prompt + line["query"] for line in lines],
        "positive": [passage_prompt + line["pos"][0] for line in lines],
    }
    for number in range(job["group"] - 1):
        columns[f"negative_{number}"] = [passage_prompt + line["neg"][number] for line in lines]
    model = SentenceTransformer(job["model"], device=job["device"])
    model.max_seq_length = job["passage_max_len"]
    options = {"mini_batch_size": job["chunk"]} if job["contender"].startswith("Cached") else {}
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(**common_arguments(job, f"{folder}/run")),
        train_dataset=datasets.Dataset.from_dict(columns),
        loss=getattr(losses, job["contender"])(model, scale=50.0, **options),
        callbacks=[timer],
    )
    reset_peak_memory(job["device"])
    trainer.train()


def work(job: dict[str, Any]) -> dict[str, Any]:
    """One contender's run: seconds of each step after the warm-up, and its peak memory in bytes."""
    timer = step_timer(job["device"])
    contender = job["contender"]
    if isinstance(contender, dict):
        train = train_ours
    else:
        train = train_flagembedding if contender == "flagembedding" else train_sentence_transformers
    with tempfile.TemporaryDirectory() as folder:
        train(job, folder, timer)
    times = {"seconds": timer.seconds(job["warmup"]), "cpu_seconds": timer.seconds(job["warmup"], processor=True)}
    return times | {"peak_bytes": peak_memory(job["device"])}


def main() -> None:
    """The command line."""
    parser = training_parser(__doc__, "training.json", group=3, query_max_len=64, passage_max_len=160, rounds=3)
    parser.add_argument("--batch", type=int, default=8, help="queries a step")
    parser.add_argument("--chunk", type=int, default=8, help="texts of full length a chunk where gradients are cached")
    parser.add_argument("--warmup", type=int, default=3, help="steps left out, at least 1")
    parser.add_argument("--steps", type=int, default=10, help="steps measured, in each round")
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS), metavar="NAME")
    args = parser.parse_args()
    if args.job:
        print(json.dumps(work(json.loads(args.job))))
        return
    from clpl_moe.encoder.settings import read_settings

    base = read_settings(args.model)
    device = pick_device(args.device)
    job = {
        "model": str(Path(args.model).resolve()) if Path(args.model).is_dir() else args.model,
        "device": device,
        "precision": pick_precision(args.precision, device),
        "prompts": [base.query_prompt, base.passage_prompt],
        "steps": args.warmup + args.steps,
    } | {
        name: getattr(args, name) for name in ("batch", "group", "query_max_len", "passage_max_len", "chunk", "warmup")
    }
    with tempfile.TemporaryDirectory() as folder:
        examples = args.batch * job["steps"]
        data = write_data(args.data, Path(folder), args.model, examples, args.group - 1, args.query_max_len)
        job["data"] = str(data)

        def run(name: str) -> dict[str, Any]:
            result = in_fresh_process(__file__, job | {"contender": CONTENDERS[name]})
            print(f"{name}: {args.batch * args.steps / sum(result['seconds']):.2f} examples a second", flush=True)
            return result

        # After each round, so that one that takes too long leaves those before.
        settings = job | {"model": Path(args.model).name, "data": args.data.name}
        write = partial(write_rates, args.output, settings, args.batch)
        alternate({name: partial(run, name) for name in args.only}, args.rounds, write)


def write_rates(output: Path, settings: dict[str, Any], batch: int, results: dict[str, list[dict[str, Any]]]) -> None:
    """Write the result file of what :func:`work` returned for each contender in each round."""
    rows = []
    for name, of_rounds in results.items():
        # A round's figure, then over rounds.
        rates = summary([batch * len(r["seconds"]) / sum(r["seconds"]) for r in of_rounds])
        processor = summary([sum(r["cpu_seconds"]) / batch / len(r["seconds"]) for r in of_rounds])
        rows.append(
            {
                "trainer": name,
                "examples/s": round(rates["median"], 2),
                "low": round(rates["low"], 2),
                "high": round(rates["high"], 2),
                # Steadier where other work shares the cores.
                "CPU s/example": round(processor["median"], 2),
                "peak MiB": round(summary([r["peak_bytes"] for r in of_rounds])["median"] / 2**20),
            }
        )
    question = "Examples a second in training, and the highest memory: medians over rounds."
    write_result(output, question, settings | {"rounds": len(of_rounds)}, rows, results)


if __name__ == "__main__":
    main()
