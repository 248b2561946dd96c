"""The examples of each batch: a function of the seed and the epoch, so that a resumed run goes on exactly.

1. :func:`plan_batches` divides an epoch into the batches of whole optimizer steps, the same for every process.
2. A planned batch is cut into slices of ``per_device_train_batch_size`` examples. They go to the processes in turn, first
   those of the first accumulated pass. So every split of a batch into processes and passes has the same examples, and
   with equal slices the same slices.
3. Where a short batch leaves a process without a slice, it takes one example that counts nothing.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain

from torch.utils.data import Sampler

from clpl_moe.data.dataset import Draw
from clpl_moe.data.near_copies import Marks, Together, count_together

_LOOKED_AT = 1000  # places, for an example that fits nowhere


def plan_batches(
    parts: Sequence[range], size: int, seed: int, epoch: int, *, drop_last: bool = False, marks: Marks | None = None
) -> list[list[int]]:
    """The batches of an epoch: at most ``size`` numbers of examples of one part each, every example once.

    With ``drop_last`` a part's last, incomplete batch is left out. With ``marks`` no batch has two examples that share one,
    as long as there are others left; the number of batches is the same.
    """
    rng = random.Random(f"{seed}-{epoch}")
    batches = []
    for part in parts:
        order = rng.sample(part, len(part))
        order = order if marks is None else _apart(order, size, marks)
        end = len(order) // size * size if drop_last else len(order)
        batches += [order[start : start + size] for start in range(0, end, size)]
    rng.shuffle(batches)
    return batches


def _apart(order: list[int], size: int, marks: Marks) -> list[int]:
    """The numbers in another order, in which those of every ``size`` share no mark: one that does waits for a later batch. What
    still waits at the end changes places with one of a batch before, or stays there."""
    found: list[int] = []
    forced: list[int] = []
    coming, waiting = iter(order), deque[int]()
    for start in range(0, len(order), size):
        room, taken = min(size, len(order) - start), set[int]()
        # Of those that wait, not more are looked at than may fit: many may wait for each other.
        candidates = chain((waiting.popleft() for _ in range(min(len(waiting), 2 * size))), coming)
        late: list[int] = []
        for number in candidates:
            own = marks[number]
            if own.isdisjoint(taken):
                taken |= own
                found.append(number)
                room -= 1
                if not room:
                    break
            else:
                late.append(number)
        waiting.extend(late)
        forced += range(len(found), len(found) + room)
        found += [waiting.popleft() for _ in range(room)]
    for place in forced:
        _exchange(found, place, size, marks)
    return found


def _exchange(found: list[int], place: int, size: int, marks: Marks) -> None:
    """Give a number's place to one of another batch, so that both share no mark with the others of their new batches."""

    def fits(number: int, at: int) -> bool:
        start = at // size * size
        others = (found[i] for i in range(start, min(start + size, len(found))) if i != at)
        return all(marks[number].isdisjoint(marks[other]) for other in others)

    start = place // size * size
    if fits(found[place], place):
        return
    for other in range(start - 1, max(-1, start - _LOOKED_AT), -1):
        if fits(found[place], other) and fits(found[other], place):
            found[place], found[other] = found[other], found[place]
            return


class EpochBatchSampler(Sampler[list[Draw]]):
    """Batches of one process: of each planned batch one for each accumulated pass.

    Args:
        part_sizes: number of examples of each part of the dataset.
        batch_size: examples per process and pass.
        accumulation: passes per optimizer step.
        whole_steps: whether batches are planned for whole steps; otherwise for single passes, as in checkpoints of
            before.
        separate_parts: whether each planned batch takes examples of one part only.
        drop_last: whether to leave out a part's last, incomplete batch.
        marks: of the examples; a batch has none that share one, where this can be.
        even: whether all processes need equally many examples in each pass; a short pass is filled up with examples of its
            batch.
    """

    def __init__(
        self,
        part_sizes: list[int],
        batch_size: int,
        seed: int,
        *,
        accumulation: int = 1,
        whole_steps: bool = True,
        process_index: int = 0,
        num_processes: int = 1,
        separate_parts: bool = False,
        drop_last: bool = False,
        even: bool = False,
        marks: Marks | None = None,
    ) -> None:
        ends = list(accumulate(part_sizes)) if separate_parts else [sum(part_sizes)]
        self.parts = [range(start, end) for start, end in zip([0, *ends], ends)]
        self.batch_size = batch_size
        self.seed = seed
        self.whole_steps = whole_steps
        self.passes = accumulation if whole_steps else 1
        self.process_index = process_index
        self.num_processes = num_processes
        self.drop_last = drop_last
        self.even = even
        self.marks = marks
        self.epoch = 0
        self._planned: tuple[int, list[list[int]]] | None = None

    @property
    def planned_size(self) -> int:
        """Examples of a planned batch, over all processes and passes."""
        return self.batch_size * self.num_processes * self.passes

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose batches come next."""
        self.epoch = epoch

    def __len__(self) -> int:
        size = self.planned_size
        return self.passes * sum(len(p) // size if self.drop_last else math.ceil(len(p) / size) for p in self.parts)

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch = self.epoch
        for batch in self._plan():
            for number in range(self.passes):
                yield [(epoch, index) for index in self._share(batch, number)]

    def queries(self, first: int, number: int) -> tuple[list[int], int]:
        """How many queries count in each of this process's batches ``first`` to ``first + number``, and in all processes'
        together."""
        of_all = [
            [
                self._count(len(self._plan()[i // self.passes]), i % self.passes, rank)
                for i in range(first, first + number)
            ]
            for rank in range(self.num_processes)
        ]
        return of_all[self.process_index], sum(map(sum, of_all))

    def together(self) -> Together | None:
        """How distinct the batches of this epoch are; None without marks."""
        return None if self.marks is None else count_together(self._plan(), self.marks)

    def _plan(self) -> list[list[int]]:
        if self._planned is None or self._planned[0] != self.epoch:
            at = self.planned_size, self.seed, self.epoch
            self._planned = self.epoch, plan_batches(self.parts, *at, drop_last=self.drop_last, marks=self.marks)
        return self._planned[1]

    def _count(self, examples: int, number: int, rank: int) -> int:
        """Of a planned batch of so many examples, those of one process in one pass."""
        left = examples - number * self.num_processes * self.batch_size
        if self.even:
            return max(0, min(self.batch_size, math.ceil(left / self.num_processes)))
        return max(0, min(self.batch_size, left - rank * self.batch_size))

    def _share(self, batch: list[int], number: int) -> list[int]:
        start = number * self.num_processes * self.batch_size
        count = self._count(len(batch), number, self.process_index)
        if count == 0:
            return batch[:1]
        start += self.process_index * (count if self.even else self.batch_size)
        share = batch[start : start + count]
        return share + (batch * count)[: count - len(share)]
