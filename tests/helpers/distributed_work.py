"""What each process of ``test_distributed.py`` does: ``torchrun distributed_work.py FOLDER``, cases in ``cases.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback


class KeepGradients(TrainerCallback):
    """Keeps the gradients of the first optimizer step, averaged over processes as the optimizer sees them."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] | None = None

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if self.gradients is None:
            named = ((name.removeprefix("module."), p) for name, p in model.named_parameters())
            self.gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}


def train_keeping_gradients(argv: list[str]) -> tuple[dict[str, torch.Tensor], int]:
    """Train; the first step's gradients, and how many processes took part."""
    from helpers.tiny_training import make_runner

    runner, keep = make_runner(argv), KeepGradients()
    runner.trainer.add_callback(keep)
    runner.run()
    return keep.gradients, runner.training_args.world_size


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for name, argv in json.loads((folder / "cases.json").read_text()).items():
        gradients, processes = train_keeping_gradients(argv)
        rank = torch.distributed.get_rank()
        torch.save((gradients, processes), folder / f"{name}-{rank}.pt")
