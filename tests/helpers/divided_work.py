"""Trains in several processes that talk through gloo, as a launcher of ``configs/accelerate`` starts them on GPUs.

accelerate divides models on accelerators only. Here it is told to do so on a CPU, too.
"""

from __future__ import annotations

import os
import socket
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType

WAIT = 900  # seconds: on a busy machine processes take minutes to load their modules

# What ``accelerate launch --config_file configs/accelerate/NAME.yaml`` sets for its processes.
LAUNCHERS: dict[str, dict[str, str]] = {
    "ddp": {},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
    "fsdp1": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"},
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}


def divide_on_a_cpu() -> None:
    """Let accelerate's state take FSDP and DeepSpeed on a CPU, too."""
    make = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        known, on_cpu = "distributed_type" in AcceleratorState._shared_state, os.environ.pop("ACCELERATE_USE_CPU", None)
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            kwargs["cpu"] = False
        make(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if on_cpu is not None:
            os.environ["ACCELERATE_USE_CPU"] = on_cpu
        if fsdp_plugin is not None and not known:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init  # type: ignore[method-assign]


def train_in_processes(count: int, cases: list[tuple[str, list[str]]]) -> None:
    """Train one after the other what ``cases`` say, launcher and arguments, in ``count`` processes."""
    with socket.socket() as free:
        # As long as it is bound no other process gets the port; the first of ours may listen there all the same.
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        # One server imports everything once.
        mp.get_context("forkserver").set_forkserver_preload(["clpl_moe.train.runner"])
        running = mp.start_processes(_work, (count, port, cases), count, join=False, start_method="forkserver")
        end = time.monotonic() + WAIT
        while not running.join(timeout=10):
            if time.monotonic() > end:
                for process in running.processes:
                    process.kill()
                raise TimeoutError(f"{count} processes have not ended after {WAIT} s")


def _work(rank: int, count: int, port: int, cases: list[tuple[str, list[str]]]) -> None:
    from helpers.tiny_training import make_runner

    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    divide_on_a_cpu()
    for launcher, argv in cases:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        os.environ.update(LAUNCHERS[launcher])
        make_runner(argv).run()
        for name in LAUNCHERS[launcher]:
            os.environ.pop(name, None)
    dist.destroy_process_group()
