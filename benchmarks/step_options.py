"""What do other optimizers and ``torch.compile`` save in a training step, and what do they cost?

``python benchmarks/step_options.py --model models/small-encoder``

Each contender is this package's trainer with another option of transformers' Trainer, in a fresh process: the time of a step after
the first ones, in which ``torch.compile`` compiles, its highest memory, the time of those first steps, and the mean loss of all,
beside those of the default.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from common import (
    alternate,
    in_fresh_process,
    peak_memory,
    pick_device,
    pick_precision,
    summary,
    write_result,
)
from training import step_timer, train_ours, training_parser, write_data

CONTENDERS = {
    "adamw_torch_fused": {},  # the default
    "adamw_torch": {"optim": "adamw_torch"},
    "adamw_8bit": {"optim": "adamw_8bit"},
    "adafactor": {"optim": "adafactor"},
    "torch_compile": {"torch_compile": True},
}


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each step after the warm-up and of the warm-up, the peak memory in bytes, and the mean loss of all steps."""
    timer = step_timer(job["device"])
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = train_ours(job, folder, timer)
    return {
        "seconds": timer.seconds(job["warmup"]),
        "warmup_seconds": timer.ends[job["warmup"] - 1] - start,
        "peak_bytes": peak_memory(job["device"]),
        "loss": trainer.state.log_history[0]["train_loss"],
    }


def main() -> None:
    """The command line."""
    parser = training_parser(__doc__, "step_options.json", group=3, query_max_len=32, passage_max_len=128, rounds=3)
    parser.add_argument("--batch", type=int, default=4, help="queries a step")
    parser.add_argument("--trainable", default="full", choices=["moe", "ffn", "full"])
    parser.add_argument("--warmup", type=int, default=3, help="steps left out, at least 1")
    parser.add_argument("--steps", type=int, default=7, help="steps measured, in each round")
    parser.add_argument("--only", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS), metavar="NAME")
    args = parser.parse_args()
    if args.job:
        print(json.dumps(work(json.loads(args.job))))
        return
    if "adamw_8bit" in args.only and not importlib.util.find_spec("bitsandbytes"):
        parser.error("adamw_8bit needs `pip install bitsandbytes`, or name the others with --only")
    device = pick_device(args.device)
    settings = {
        "device": device,
        "precision": pick_precision(args.precision, device),
        "steps": args.warmup + args.steps,
    } | {
        name: getattr(args, name)
        for name in ("batch", "group", "query_max_len", "passage_max_len", "trainable", "warmup")
    }
    with tempfile.TemporaryDirectory() as folder:
        examples = args.batch * settings["steps"]
        data = write_data(args.data, Path(folder), args.model, examples, args.group - 1, args.query_max_len)

        def run(name: str) -> dict[str, Any]:
            experts = 2 if args.trainable == "moe" else 0
            contender = {"num_experts": experts, "trainable": args.trainable, "penalty_weight": 0.1, **CONTENDERS[name]}
            job = settings | {"data": str(data), "model": str(Path(args.model).resolve())}
            result = in_fresh_process(__file__, job | {"contender": contender})
            step = summary(result["seconds"])["median"]
            print(f"{name}: {step:.2f} s a step, {result['peak_bytes'] / 2**20:.0f} MiB", flush=True)
            return result

        results = alternate({name: (lambda name=name: run(name)) for name in args.only}, args.rounds)
    first = results[args.only[0]]
    rows = []
    for name, of_rounds in results.items():
        ratios = [
            summary(r["seconds"])["median"] / summary(f["seconds"])["median"]
            for r, f in zip(of_rounds, first, strict=True)
        ]
        rows.append(
            {
                "option": name,
                "s/step": round(summary([summary(r["seconds"])["median"] for r in of_rounds])["median"], 3),
                "times the first": round(summary(ratios)["median"], 3),
                "warm-up s": round(summary([r["warmup_seconds"] for r in of_rounds])["median"], 1),
                "peak MiB": round(summary([r["peak_bytes"] for r in of_rounds])["median"] / 2**20),
                "mean loss": round(of_rounds[0]["loss"], 4),
            }
        )
    write_result(
        args.output,
        "Time and highest memory of a training step with other optimizers and with torch.compile: medians over rounds.",
        settings | {"model": Path(args.model).name, "data": args.data.name, "rounds": args.rounds},
        rows,
        results,
    )


if __name__ == "__main__":
    main()
