"""The examples of each batch: a function of the seed and the epoch, so that a resumed run goes on exactly."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from itertools import accumulate

from torch.utils.data import Sampler

from clpl_moe.data.dataset import Draw


class EpochBatchSampler(Sampler[list[Draw]]):
    """Batches of one process.

    All processes share one order of global batches, and each takes its part: N processes with batch B train on the
    batches of one process with batch N·B. A global batch that cannot be divided evenly is filled up with the first
    examples of the epoch. ``batch_size`` is per process. With ``separate_parts`` each global batch takes examples of one
    part of the dataset only.
    """

    def __init__(
        self,
        part_sizes: list[int],
        batch_size: int,
        seed: int,
        *,
        process_index: int = 0,
        num_processes: int = 1,
        separate_parts: bool = False,
        drop_last: bool = False,
    ) -> None:
        ends = list(accumulate(part_sizes)) if separate_parts else [sum(part_sizes)]
        self.parts = [range(start, end) for start, end in zip([0, *ends], ends)]
        self.batch_size = batch_size
        self.seed = seed
        self.process_index = process_index
        self.num_processes = num_processes
        self.drop_last = drop_last
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        size = self.batch_size * self.num_processes
        return sum(len(p) // size if self.drop_last else math.ceil(len(p) / size) for p in self.parts)

    def __iter__(self) -> Iterator[list[Draw]]:
        rng = random.Random(f"{self.seed}-{self.epoch}")
        size = self.batch_size * self.num_processes
        batches = []
        for part in self.parts:
            order = rng.sample(part, len(part))
            for start in range(0, len(order), size):
                batch = order[start : start + size]
                if len(batch) < size and self.drop_last:
                    continue
                short = -len(batch) % self.num_processes
                batch += (order * short)[:short]
                batches.append(batch)
        rng.shuffle(batches)
        for batch in batches:
            share = len(batch) // self.num_processes
            mine = batch[self.process_index * share : (self.process_index + 1) * share]
            yield [(self.epoch, index) for index in mine]
