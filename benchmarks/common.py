"""What the benchmarks share: the machine's description, timing side by side, fresh processes, memory, result files."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from clpl_moe.common.files import write_json
from clpl_moe.common.machine import machine, versions, without_folders
from clpl_moe.common.machine import peak_memory as peak_memory
from clpl_moe.encoder.precision import fast_bfloat16

RESULTS = Path(__file__).parent / "results"

Name = TypeVar("Name")
Result = TypeVar("Result")


def benchmark_parser(description: str, output: str) -> argparse.ArgumentParser:
    """What the benchmarks of training are all asked: model, device, precision, and the result file's name in ``RESULTS``."""
    parser = argparse.ArgumentParser(
        description=description.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", default="models/small-encoder", help="model folder")
    parser.add_argument("--output", type=Path, default=RESULTS / output)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    return parser


def alternate(
    functions: dict[Name, Callable[[], Result]],
    rounds: int,
    on_round: Callable[[dict[Name, list[Result]]], object] = lambda results: None,
) -> dict[Name, list[Result]]:
    """Call every function once a round, in turn and every other round backwards, so that what slows a machine down for a
    while slows all of them down; ``on_round`` is told the results so far after each."""
    results: dict[Name, list[Result]] = {name: [] for name in functions}
    for number in range(rounds):
        for name in list(functions)[:: -1 if number % 2 else 1]:
            results[name].append(functions[name]())
        on_round(results)
    return results


def summary(values: Sequence[float]) -> dict[str, float]:
    """``median``, ``low`` and ``high`` of the values, and ``spread``: (high - low) / median."""
    median, low, high = statistics.median(values), min(values), max(values)
    return {"median": median, "low": low, "high": high, "spread": (high - low) / median if median else math.nan}


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Slope of the least-squares line through (log x, log y): the exponent with which y grows with x."""
    return statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope


def pick_device(name: str) -> str:
    """``auto`` resolved: a CUDA device where there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # by their names in --precision


def pick_precision(name: str, device: str) -> str:
    """``auto`` resolved: bf16 where the hardware multiplies matrices in it, else fp32."""
    if name != "auto":
        return name
    if fast_bfloat16(torch.device(device)):
        return "bf16"
    return "fp16" if device == "cuda" else "fp32"


def synchronize(device: str) -> None:
    """Wait until a device has done what it was given, so that a clock read next is right."""
    if device != "cpu":
        torch.get_device_module(device).synchronize()


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Duration of one call, with all that it started on the device."""
    synchronize(device.type)
    start = time.perf_counter()
    call()
    synchronize(device.type)
    return time.perf_counter() - start


def side_by_side(
    calls: dict[str, Callable[[], object]], device: torch.device, repeats: int, warmup: int = 1
) -> dict[str, dict[str, float]]:
    """Time calls in turn, and compare each with the first one.

    Every repetition runs all calls once, so that what else the machine does falls on all of them; the ratio is taken within a
    repetition. The first call of a repetition is another one each time.

    Returns:
        By name: ``seconds``, the median; ``ratio``, the median of the ratios to the first call; ``ratio_low`` and
        ``ratio_high``, their quartiles.
    """
    names = list(calls)
    for _ in range(warmup):
        for call in calls.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(repeats):
        shift = repeat % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(seconds(calls[name], device))
    results = {}
    for name in names:
        ratios = [t / base for t, base in zip(times[name], times[names[0]], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if repeats > 1 else ratios * 3
        results[name] = {
            "seconds": round(statistics.median(times[name]), 5),
            "ratio": round(middle, 3),
            "ratio_low": round(low, 3),
            "ratio_high": round(high, 3),
        }
    return results


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int, repeats: int) -> float:
    """Operations a second of a square matrix product: what the hardware gives at its best."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = side_by_side({"matmul": lambda: a @ b}, device, repeats, warmup=3)
    return 2 * size**3 / times["matmul"]["seconds"]


def encoder_flops(shape: dict[str, int], lengths: Sequence[int]) -> tuple[float, float]:
    """Operations of an encoder's Linear layers, and of its attention, for texts of these lengths, unpadded.

    ``shape`` has the names of a model's configuration: ``hidden_size``, ``intermediate_size``, ``num_hidden_layers``.
    """
    hidden, ffn, layers = (shape[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    linear = 2 * sum(lengths) * (4 * hidden**2 + 2 * hidden * ffn)
    attention = 4 * sum(length**2 for length in lengths) * hidden
    return layers * linear, layers * attention


def print_table(title: str, results: dict[str, dict[str, float]]) -> None:
    """Print what :func:`side_by_side` returned."""
    print(f"\n{title}\n{'':24} {'seconds':>9} {'ratio':>7}   quartiles")
    for name, row in results.items():
        print(
            f"{name:24} {row['seconds']:9.4f} {row['ratio']:7.3f}   {row['ratio_low']:.3f} to {row['ratio_high']:.3f}",
            flush=True,
        )


def reset_peak_memory(device: str) -> None:
    """Let :func:`peak_memory` forget what was before, such as loading a model; on CPUs needs Linux."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        clear = Path("/proc/self/clear_refs")
        if clear.exists():
            clear.write_text("5")


def in_fresh_process(script: str | Path, job: dict[str, Any]) -> Any:
    """Run ``script --job JSON`` in a process of its own, on one GPU at most; returns the JSON of its last line.

    Raises:
        RuntimeError: it failed; with the end of what it wrote to stderr.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": visible, "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(script), "--job", json.dumps(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{job} ended with code {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def write_result(
    output: str | Path,
    question: str,
    settings: dict[str, Any],
    rows: list[dict[str, Any]],
    measurements: dict[str, Any],
) -> None:
    """Write a result file, of which ``table.py`` makes a table.

    Args:
        output: the file, commonly in ``benchmarks/results/``.
        question: what was measured, in a sentence; the table's caption.
        settings: everything that another run needs to be the same; paths by name only.
        rows: one for each line of the table, all with the same keys, which become its columns.
        measurements: the single values that the rows sum up.
    """
    result = {
        "question": question,
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *without_folders(sys.argv[1:])]),
        "machine": machine(),
        "versions": versions(),
        "settings": settings,
        "rows": rows,
        "measurements": measurements,
    }
    write_json(output, result)
    print(f"wrote {output}")
