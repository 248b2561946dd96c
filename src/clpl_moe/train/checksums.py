"""Checksums of a checkpoint's files: they tell whether it is as it was written."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerState

from clpl_moe.common.errors import UserError, at
from clpl_moe.common.files import read_json, write_json
from clpl_moe.encoder.weights import HEAD_FILES
from clpl_moe.train.ance import NEGATIVES_FILE

STATE_FILE = "trainer_state.json"
CHECKSUMS_FILE = "checksums.json"
# What a resumed run reads, but for the files of DeepSpeed and FSDP.
_READ = (
    *(STATE_FILE, NEGATIVES_FILE, *HEAD_FILES, "model*.safetensors", "*.safetensors.index.json"),
    *("adapter_model.safetensors", "adapter_config.json", "moe_config.json"),
    *("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth"),
)
_BLOCK = 2**20  # bytes


@contextlib.contextmanager
def with_checksums(state: TrainerState, then: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Within the block, ``state`` writes itself into checkpoints after the checksums of all files, and whole or not at all;
    ``then`` is called when a checkpoint is whole."""

    def save_to_json(path: str) -> None:
        file = Path(path)
        unfinished = file.with_name(f".{file.name}")
        TrainerState.save_to_json(state, str(unfinished))
        write_json(file.with_name(CHECKSUMS_FILE), _checksums(file.parent) | {file.name: _checksum(unfinished)})
        unfinished.replace(file)
        then()

    vars(state)["save_to_json"] = save_to_json
    try:
        yield
    finally:
        del vars(state)["save_to_json"]


def _checksums(folder: Path) -> dict[str, dict[str, Any]]:
    found = {path.name: path for name in _READ for path in folder.glob(name) if path.is_file()}
    return {name: _checksum(found[name]) for name in sorted(found)}


def _checksum(path: Path) -> dict[str, Any]:
    """Size, and digest of the first and the last block: they have the tables of all that safetensors and torch write, and
    gigabytes need not be read."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(file.read(_BLOCK))
        file.seek(max(_BLOCK, size - _BLOCK))
        digest.update(file.read(_BLOCK))
    return {"size": size, "sha256": digest.hexdigest()}


def compare(folder: Path) -> None:
    """Raise :class:`UserError` where a file of a checkpoint is not the one that was written."""
    written, now = read_json(folder / CHECKSUMS_FILE, dict), _checksums(folder)
    for name in sorted(written.keys() | now.keys()):
        if name not in now:
            raise UserError(f"{at(folder / name)}: no such file")
        if name not in written and name.startswith("rng_state_"):
            continue  # another process's, which was slow to show on a shared disk
        if written.get(name) != now[name]:
            raise UserError(f"{at(folder / name)}: damaged (changed since the checkpoint was written)")
