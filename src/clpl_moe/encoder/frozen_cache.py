"""The outputs of an encoder's frozen layers, kept by text, so that no later pass computes them again.

Training and its evaluations send the same texts through an encoder many times. As long as the lower layers are frozen, and have no
dropout, a text's hidden states above them are always the same. So they are a function of the text's token ids and of the precision
to compute in.

States lie in the host's memory. Nothing that is kept makes room for anything else: when the room is full, other texts are computed
each time.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from clpl_moe.common.errors import OptionError

if TYPE_CHECKING:
    from clpl_moe.encoder.packing import PackedTexts

logger = logging.getLogger(__name__)

_ATTRIBUTE = "frozen_cache"  # of a model, which its state dict leaves out


class FrozenCache:
    """Hidden states of texts after the lowest layers, of one encoder or of several that share these layers. Threads may share it.

    Args:
        layers: how many layers are below the states, at least 1; neither they nor the embeddings change.
        width: of a token's states.
        size: bytes of states that are kept.
        dtype: that states are kept in. In float16 they take half the room; all texts have states of this precision, kept or not.

    Raises:
        OptionError: there is no such room.
    """

    def __init__(self, layers: int, width: int, size: int, *, dtype: torch.dtype = torch.float32) -> None:
        self.layers, self.dtype = layers, dtype
        tokens = size // (width * dtype.itemsize)
        self._states = _room(tokens * width, dtype).view(tokens, width)
        self._places: dict[tuple[torch.dtype, bytes], slice] = {}  # of kept texts, in the rows of the states
        self._used = 0  # rows
        self._full = False
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """How many texts are kept."""
        return len(self._places)

    def states(self, texts: PackedTexts, compute: Callable[[PackedTexts], Tensor], *, precision: torch.dtype) -> Tensor:
        """The states (T, D) of ``texts``, on their device, in :attr:`dtype`.

        ``compute`` is called once, with the texts that are not kept, if there are any, and returns their states. These differ
        by the ``precision`` that it computes in.
        """
        lengths, device = texts.lengths.tolist(), texts.input_ids.device
        keys = [(precision, ids.numpy().tobytes()) for ids in texts.host_ids.to(torch.int32).split(lengths)]
        parts = {row: self._states[place] for row, key in enumerate(keys) if (place := self._places.get(key))}
        new = [row for row in range(len(keys)) if row not in parts]
        if new:
            computed = compute(texts.select(new)).to(self.dtype).cpu()
            for row, part in zip(new, computed.split([lengths[row] for row in new]), strict=True):
                parts[row] = part
                self._keep(keys[row], part)
        # Page-locked, so that the copy to a GPU waits for nothing.
        found = torch.empty(sum(lengths), self._states.shape[1], dtype=self.dtype, pin_memory=device.type == "cuda")
        torch.cat([parts[row] for row in range(len(keys))], out=found)
        return found.to(device, non_blocking=True)

    def _keep(self, key: tuple[torch.dtype, bytes], states: Tensor) -> None:
        with self._lock:
            place = slice(self._used, self._used + len(states))
            if key in self._places:
                return
            if place.stop > len(self._states):
                if not self._full:
                    logger.warning(
                        "the frozen layers' outputs of %s texts fill frozen_cache_gb: those of other texts are computed each time",
                        f"{len(self):,}",
                    )
                self._full = True
                return
            self._states[place] = states
            self._used = place.stop
            self._places[key] = place  # last: who finds it reads without the lock


def _room(numbers: int, dtype: torch.dtype) -> Tensor:
    """(numbers,) of whatever is there; pages of memory are taken as they are written."""
    try:
        # torch's own is filled where algorithms are to be deterministic.
        return torch.from_numpy(np.empty(numbers, str(dtype).removeprefix("torch.")))
    except MemoryError:
        size = f"{numbers * dtype.itemsize / 1e9:g} GB"
        raise OptionError("frozen_cache_gb", f"found no room of {size} in memory, expected less") from None


def set_frozen_cache(model: nn.Module, cache: FrozenCache | None) -> None:
    """Let all passes of a model in packed batches begin above its frozen layers; None: let them be as before."""
    setattr(model, _ATTRIBUTE, cache)


def frozen_cache_of(model: nn.Module) -> FrozenCache | None:
    """What :func:`set_frozen_cache` set."""
    return getattr(model, _ATTRIBUTE, None)
