"""What torch is asked to compute."""

from __future__ import annotations

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Calls(TorchDispatchMode):
    """Counts the operations of a block, by overload such as ``torch.ops.aten.addmm_.default``."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function] += 1
        return function(*args, **(kwargs or {}))


def saved_elements(call):
    """Sizes of the tensors that a call keeps for its backward pass, apart from parameters; its result."""
    sizes = []

    def pack(tensor):
        if not tensor.is_leaf or not tensor.requires_grad:
            sizes.append((tensor.numel(), tensor.element_size()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    return sizes, result
