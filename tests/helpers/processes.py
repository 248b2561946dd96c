"""Runs a function in several processes that talk through gloo, as a training launched by torchrun does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# pytest names a test's module from the repository's root on; the processes import it by that name.
_ROOT = str(Path(__file__).parents[2])


def run_in_processes(function: Callable[[int], Any], folder: Path, count: int = 2) -> list[Any]:
    """What ``function(rank)``, a function of a module, returns in each of ``count`` processes."""
    if _ROOT not in sys.path:
        sys.path.append(_ROOT)
    # One server imports everything once; its forks have no threads, as a fork of this process would.
    mp.get_context("forkserver").set_forkserver_preload(["clpl_moe.moe.balance", "transformers", "hypothesis"])
    mp.start_processes(_work, (function, str(folder), count), count, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _work(rank: int, function: Callable[[int], Any], folder: str, count: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count)
    torch.save(function(rank), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
