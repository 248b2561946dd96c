"""What the modules of one layer share during a forward pass: which tokens are real, and the router's records."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor


class LayerState:
    """What a layer's attention and feed-forward modules have to share: which tokens are real, and the record.

    What belongs to a forward pass is kept for each thread by itself, so that threads can share a model. Copies and
    pickles of a model start without it, and without records.
    """

    def __init__(self, tracking: bool = False) -> None:
        self.tracking = tracking  # whether training forwards leave records; off, since records hold on to the graph
        self.records: list[RouterRecord] = []
        self._pass = threading.local()

    # torch.compile takes values of one thread for constants: it has to leave these to Python.

    @torch.compiler.disable
    def get_tokens(self) -> Tensor | None:
        """Indices of the real tokens in the flattened batch; None where all are real."""
        return getattr(self._pass, "tokens", None)

    @torch.compiler.disable
    def set_tokens(self, tokens: Tensor | None) -> None:
        """Set what :meth:`get_tokens` returns in this thread."""
        self._pass.tokens = tokens

    @torch.compiler.disable
    def is_running(self) -> bool:
        """Whether the encoder's own pass is under way, and not what gradient checkpointing repeats of it."""
        return getattr(self._pass, "running", False)

    @torch.compiler.disable
    def set_running(self, running: bool) -> None:
        """Set what :meth:`is_running` returns in this thread."""
        self._pass.running = running

    def __reduce__(self) -> tuple:
        return LayerState, (self.tracking,)


@dataclass
class RouterRecord:
    """What one call of one router leaves for losses and logs; N experts.

    Attributes:
        counts: (N,) float32, assignments to each expert; they sum to tokens times ``top_k``.
        probability_sums: (N,) with a graph, the sum over tokens of each expert's softmax probability.
        z_sum: scalar with a graph, the sum over tokens of the squared log-sum-exp of the logits.
    """

    counts: Tensor
    probability_sums: Tensor
    z_sum: Tensor
