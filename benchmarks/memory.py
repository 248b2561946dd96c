"""How much memory does a large batch take with gradient caching, and without?

``python benchmarks/memory.py --model models/small-encoder``

Each figure is the highest memory of a few training steps of this package's trainer, from after the model was loaded, in a
fresh process: allocated on the GPU, or resident on a CPU.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from common import alternate, in_fresh_process, pick_device, pick_precision, summary, write_result
from training import step_timer, train_ours, training_parser, write_data


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Peak memory in bytes and seconds of the last step."""
    from common import peak_memory

    timer = step_timer(job["device"])
    with tempfile.TemporaryDirectory() as folder:
        train_ours(job, folder, timer)
    return {"peak_bytes": peak_memory(job["device"]), "seconds": timer.seconds(warmup=1)[-1]}


def main() -> None:
    """The command line."""
    parser = training_parser(__doc__, "memory.json", group=2, query_max_len=32, passage_max_len=64, rounds=1)
    parser.add_argument("--small", type=int, default=16, help="queries a step, the batch to compare with")
    parser.add_argument("--large", type=int, default=256, help="queries a step, the large batch")
    parser.add_argument("--grad_cache_tokens", type=int, default=2048, help="tokens a chunk")
    parser.add_argument("--trainable", default="moe", choices=["moe", "ffn", "full", "lora"])
    parser.add_argument("--no_uncached", action="store_true", help="leave out the large batch without caching")
    args = parser.parse_args()
    if args.job:
        print(json.dumps(work(json.loads(args.job))))
        return
    device = pick_device(args.device)
    settings = {
        "device": device,
        "precision": pick_precision(args.precision, device),
        "steps": 2,
    } | {name: getattr(args, name) for name in ("group", "query_max_len", "passage_max_len", "trainable")}
    cases = {
        f"batch {args.small}": (args.small, None),
        f"batch {args.large}, {args.grad_cache_tokens} tokens a chunk": (args.large, args.grad_cache_tokens),
    }
    if not args.no_uncached:
        cases[f"batch {args.large}"] = (args.large, None)
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(
            args.data, Path(folder), args.model, args.large * settings["steps"], args.group - 1, args.query_max_len
        )

        def run(name: str) -> dict[str, Any]:
            batch, tokens = cases[name]
            contender = {"num_experts": 2, "trainable": args.trainable, "penalty_weight": 0.1}
            job = settings | {"batch": batch, "data": str(data), "model": str(Path(args.model).resolve())}
            result = in_fresh_process(__file__, job | {"contender": contender | {"grad_cache_tokens": tokens}})
            print(f"{name}: {result['peak_bytes'] / 2**20:.0f} MiB, {result['seconds']:.1f} s a step", flush=True)
            return result

        results = alternate({name: (lambda name=name: run(name)) for name in cases}, args.rounds)
    first = None
    rows = []
    for name, of_rounds in results.items():
        peak = summary([r["peak_bytes"] for r in of_rounds])["median"]
        first = first or peak
        rows.append(
            {
                "step": name,
                "peak MiB": round(peak / 2**20),
                f"times batch {args.small}": round(peak / first, 2),
                "s/step": round(summary([r["seconds"] for r in of_rounds])["median"], 2),
            }
        )
    write_result(
        args.output,
        "Highest memory of a training step with and without gradient caching.",
        settings | {"model": Path(args.model).name, "data": args.data.name, "rounds": args.rounds},
        rows,
        results,
    )


if __name__ == "__main__":
    main()
