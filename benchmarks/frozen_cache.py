"""What does it save to keep the outputs of frozen layers (``frozen_cache_gb``), in training and in evaluations during it?

``python benchmarks/frozen_cache.py --model models/small-encoder``

The same run with and without, in turns, each in a fresh process: an epoch in which all texts are new to the cache, then epochs in
which it knows them; then the passages are encoded, as an evaluation does it, once while they are new and once more. Ratios are of
processor time (on a GPU: of time), since other work on the machine changes this less.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from common import alternate, in_fresh_process, peak_memory, pick_device, pick_precision, summary, write_result
from training import step_timer, train_ours, training_parser, write_data


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each step of the first epoch (but the first step) and of the others, and of each pass over the passages."""
    timer, on_gpu = step_timer(job["device"]), job["device"] == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        trainer = train_ours(job, folder, timer)
    peak = peak_memory(job["device"])
    encoder = trainer._current_encoder()
    clock = time.perf_counter if on_gpu else time.process_time
    times = [clock()]
    for _ in range(2):
        encoder.encode_passages(job["passages"], max_length=job["passage_max_len"], progress=False)
        times.append(clock())
    of_steps = timer.seconds(1, processor=not on_gpu)
    return {
        "first epoch": of_steps[: job["epoch"] - 1],
        "step": of_steps[job["epoch"] - 1 :],
        "clock": timer.seconds(job["epoch"]),
        "encoding": [after - before for before, after in itertools.pairwise(times)],
        "peak_bytes": peak,
        "loss": trainer.state.log_history[0]["train_loss"],
    }


def main() -> None:
    """The command line."""
    parser = training_parser(__doc__, "frozen_cache.json", group=3, query_max_len=64, passage_max_len=160, rounds=2)
    parser.add_argument("--batch", type=int, default=4, help="queries a step")
    parser.add_argument("--epoch", type=int, default=3, help="steps of an epoch, at least 2")
    parser.add_argument("--epochs", type=int, default=3, help="at least 2")
    parser.add_argument("--frozen_layers", type=int, default=8)
    parser.add_argument("--limit", type=int, default=24, help="passages to encode")
    parser.add_argument("--gb", type=float, default=2, help="room of the cache")
    args = parser.parse_args()
    if args.job:
        print(json.dumps(work(json.loads(args.job))))
        return
    device = pick_device(args.device)
    names = ("batch", "group", "query_max_len", "passage_max_len", "epoch", "frozen_layers")
    settings: dict[str, Any] = {name: getattr(args, name) for name in names}
    settings |= {"device": device, "precision": pick_precision(args.precision, device)}
    settings["steps"] = args.epoch * args.epochs
    base = {"num_experts": 0, "trainable": "full", "penalty_weight": 0.1, "frozen_layers": args.frozen_layers}
    contenders = {"without": base, "with": base | {"frozen_cache_gb": args.gb}}
    with tempfile.TemporaryDirectory() as folder:
        examples = args.batch * args.epoch
        data = write_data(args.data, Path(folder), args.model, examples, args.group - 1, args.query_max_len)
        corpus = [json.loads(line) for line in args.data.read_text(encoding="utf-8").splitlines()]
        # Others than those of training: new to the cache at first.
        passages = list(dict.fromkeys(text for line in corpus[::-1] for text in line["pos"]))[: args.limit]
        paths = {"data": str(data), "model": str(Path(args.model).resolve()), "passages": passages}

        def run(name: str) -> dict[str, Any]:
            result = in_fresh_process(__file__, settings | paths | {"contender": contenders[name]})
            print(name, {key: value for key, value in result.items() if key != "clock"}, flush=True)
            return result

        results = alternate({name: (lambda name=name: run(name)) for name in contenders}, args.rounds)

    def median(name: str, of: str, place: int | None = None) -> float:
        parts = [r[of] if place is None else [r[of][place]] for r in results[name]]
        return summary([value for part in parts for value in part])["median"]

    measured = {
        "training step, texts new": ("first epoch", None),
        "training step, texts known": ("step", None),
        "encoding, texts new": ("encoding", 0),
        "encoding, texts known": ("encoding", 1),
    }
    rows = []
    for label, (of, place) in measured.items():
        without, with_cache = (median(name, of, place) for name in contenders)
        found = {
            "s without": round(without, 3),
            "s with": round(with_cache, 3),
            "ratio": round(with_cache / without, 3),
        }
        rows.append({"what": label, **found})
    write_result(
        args.output,
        f"Seconds of processor time with and without the outputs of {args.frozen_layers} frozen layers kept: medians over rounds.",
        settings | {"model": Path(args.model).name, "data": args.data.name, "rounds": args.rounds},
        rows,
        results,
    )
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
