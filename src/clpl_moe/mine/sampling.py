"""The order in which passages that passed the filters are taken as negatives: by rank, or drawn."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

from clpl_moe.mine.options import SelectionArguments
from clpl_moe.mine.rank import Candidate


def in_order(allowed: Sequence[Candidate], selection: SelectionArguments, draw: random.Random) -> Iterator[int]:
    """The places of the candidates in the order in which they are taken."""
    if selection.sampling == "top":
        return iter([place for place, _ in allowed])
    if selection.sampling == "random":
        return iter([place for place, _ in draw.sample(allowed, len(allowed))])
    # The greatest sums of logarithmic weight and Gumbel noise are a draw by these weights without putting back.
    keys = [s / selection.sampling_temperature - math.log(draw.expovariate(1) or 1e-300) for _, s in allowed]
    order = sorted(range(len(allowed)), key=lambda i: -keys[i])
    return iter([allowed[i][0] for i in order])


def shuffled(count: int, draw: random.Random) -> Iterator[int]:
    """The numbers below ``count`` in a random order, of which few are asked for."""
    seen: set[int] = set()
    while len(seen) < count // 2:
        number = draw.randrange(count)
        if number not in seen:
            seen.add(number)
            yield number
    rest = [number for number in range(count) if number not in seen]
    yield from draw.sample(rest, len(rest))
