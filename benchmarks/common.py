"""What the benchmarks share: the machine's description, settings of the allocator, and timing side by side."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        model = names[0] if names else model
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def keep_freed_memory() -> None:
    """Start this program again with an allocator that keeps what is freed, unless it has such settings already.

    By default glibc hands buffers of many MB back to the system and asks for them anew, page by page. That costs more than
    some of what is measured here, up to a factor of 2, and falls on the variants unevenly. The thresholds are read when a
    process starts.
    """
    settings = {"MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_MMAP_THRESHOLD_": str(1 << 40)}
    if platform.libc_ver()[0] == "glibc" and not settings.keys() <= os.environ.keys():
        os.environ.update(settings)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Duration of one call, with all that it started on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
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


def print_table(title: str, results: dict[str, dict[str, float]]) -> None:
    """Print what :func:`side_by_side` returned."""
    print(f"\n{title}\n{'':24} {'seconds':>9} {'ratio':>7}   quartiles")
    for name, row in results.items():
        print(
            f"{name:24} {row['seconds']:9.4f} {row['ratio']:7.3f}   {row['ratio_low']:.3f} to {row['ratio_high']:.3f}",
            flush=True,
        )
