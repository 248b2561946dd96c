"""Is a checkpoint whole, and as it was written?

A killed run leaves an unfinished checkpoint, a full disk or a careless hand a damaged one. So a checkpoint has checksums of
the files that a resumed run reads, and its state is written last. Checkpoints of before have no checksums: that their files
can be read is checked here, that they fit when they are loaded.
"""

from __future__ import annotations

import dataclasses
import math
import random
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerState
from transformers.trainer_pt_utils import safe_globals

from clpl_moe.common.errors import UserError, at, one_line, type_name
from clpl_moe.common.files import is_number, read_json, read_jsonl
from clpl_moe.encoder.weights import HEAD_FILES, weight_names
from clpl_moe.train.ance import NEGATIVES_FILE
from clpl_moe.train.callbacks import progress, waited
from clpl_moe.train.checksums import CHECKSUMS_FILE, STATE_FILE, compare

_NAME = re.compile(r"checkpoint-([0-9]+)")


def checkpoints(run: Path) -> list[Path]:
    """The folders of a run that are named as checkpoints, the newest first."""
    found = {p: int(m[1]) for p in run.glob("checkpoint-*") if (m := _NAME.fullmatch(p.name)) and p.is_dir()}
    return sorted(found, key=lambda folder: -found[folder])


def in_the_way(run: Path) -> list[Path]:
    """What is named as a checkpoint and is no folder."""
    return [path for path in run.glob("checkpoint-*") if _NAME.fullmatch(path.name) and not path.is_dir()]


def is_unfinished(checkpoint: Path) -> bool:
    """Whether a killed run left it: the file of the state is written last."""
    try:
        text = (checkpoint / STATE_FILE).read_bytes().strip() if (checkpoint / STATE_FILE).is_file() else b""
    except OSError:
        return False
    return not text or (text.startswith(b"{") and not text.endswith(b"}"))


def read_state(checkpoint: str | Path) -> TrainerState:
    """The trainer's state of a checkpoint; :class:`UserError` where it is none."""
    path = Path(checkpoint) / STATE_FILE
    if not path.is_file():
        raise UserError(f"{at(path)}: no such file" if not path.exists() else f"{at(path)}: not a file")
    values = read_json(path, dict)
    step, named = values.get("global_step"), _NAME.fullmatch(Path(checkpoint).name)
    if type(step) is not int or step < 1:
        raise UserError(f"{at(path, field='global_step')}: found {type_name(step)}, expected a step of at least 1")
    if named and int(named[1]) != step:
        raise UserError(f"{at(path)}: is of step {step}, the folder is {Path(checkpoint).name}")
    expected = dataclasses.asdict(TrainerState()) | {n: v for n, v in _STATE.items() if values.get(n) is not None}
    if found := unlike(values, {name: value for name, value in expected.items() if name in values}):
        raise UserError(f"{at(path)}: {found}")
    try:
        state = TrainerState.load_from_json(str(path))
        for data in values.get("stateful_callbacks", {}).values():
            for one in data if isinstance(data, list) else [data]:
                dict(one.get("args", {})), dict(one.get("attributes", {}))
        if (known := progress(state)) and (found := unlike(known, _PROGRESS)):
            raise TypeError(found)
        for total, weights in known.get("terms", {}).values():
            torch.tensor(total, dtype=torch.float64) / float(weights)
        waited(state) + 1
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{at(path)}: no state of a trainer ({one_line(error)})") from None
    return state


# Of what is None in a new state, or empty.
_STATE = {
    "epoch": 0.0,
    "best_metric": math.inf,
    "best_global_step": 0,
    "best_model_checkpoint": "",
    "train_batch_size": 0,
    "log_history": [{}],
}
_PROGRESS = {"total_loss": math.inf, "loss": math.inf, "first_step": 0, "last_logged": 0, "terms": {}}


def unlike(found: Any, expected: Any, place: str = "") -> str | None:
    """Where a value is of another kind than an expected one, in a few words; None: nowhere.

    Lists may have any length, and dicts more keys. A flag (a bool or None) may be missing. A number is finite where the
    expected one is.
    """
    inner: list[tuple[Any, Any, str]] = []
    if isinstance(expected, dict):
        fits = isinstance(found, dict)
        if fits:
            inner = [(found.get(name), value, f"{place}.{name}".lstrip(".")) for name, value in expected.items()]
    elif isinstance(expected, (list, tuple)):
        fits = isinstance(found, (list, tuple)) and (isinstance(expected, list) or len(found) == len(expected))
        if fits and expected:
            inner = [(value, expected[0], place) for value in found]
    elif expected is None or isinstance(expected, bool):
        fits = found is None or isinstance(found, (bool, int, float, str))
    elif isinstance(expected, (int, float)):
        fits = is_number(found) or (isinstance(found, float) and not is_number(expected))
    else:
        fits = isinstance(found, type(expected))
    if not fits:
        return f"field '{place}': found {type_name(found)}, expected {type_name(expected)}"
    return next((fault for one in inner if (fault := unlike(*one))), None)


def fault(checkpoint: str | Path) -> str | None:
    """What is wrong with a checkpoint; None: it is whole."""
    try:
        _check(Path(checkpoint))
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{at(error.filename or checkpoint)}: cannot be read ({error.strerror})"
    return None


def _check(folder: Path) -> None:
    for path in folder.rglob("*"):
        if not (path.is_file() or path.is_dir()):
            raise UserError(f"{at(path)}: neither a file nor a folder")
    written = folder / CHECKSUMS_FILE
    if written.exists():
        compare(folder)
    read_state(folder)
    of_others = any(folder.glob("global_step*")) or any(folder.glob("*fsdp*")) or (folder / "optimizer_0").is_dir()
    if written.exists() or of_others:  # DeepSpeed's and FSDP's, which they read themselves
        return
    weight_names(str(folder), {})
    for path in _torch_files(folder):
        try:
            with safe_globals():  # numpy's, of random states
                values = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
            if not isinstance(values, dict):
                raise TypeError(f"found a {type(values).__name__}, expected a dict")
            if path.name.startswith("rng_state"):
                random.Random().setstate(values["python"])
                np.random.RandomState().set_state(values["numpy"])
                torch.Generator().set_state(values["cpu"])
        except Exception as error:  # a file of any content may raise anything
            why = " ".join(str(error).split(". ")[0].split()) or type(error).__name__
            raise UserError(f"{at(path)}: damaged ({why[:200]})") from None
    if (folder / NEGATIVES_FILE).exists():
        for number, (line, record) in enumerate(read_jsonl(folder / NEGATIVES_FILE)):
            if found := unlike(record, {"example": 0, "neg_ids": [""]} if number else {"step": 0}):
                raise UserError(f"{at(folder / NEGATIVES_FILE, line)}: {found}")


def _torch_files(folder: Path) -> Iterator[Path]:
    """What a resumed run reads by ``torch.load``; without the optimizer's state, as of ``save_only_model``, only heads."""
    yield from (folder / name for name in HEAD_FILES if (folder / name).exists())
    states = [folder / "optimizer.pt", folder / "scheduler.pt", *sorted(folder.glob("rng_state*.pth"))]
    if not any(path.exists() for path in states):
        return
    if len(states) == 2:
        states.append(folder / "rng_state.pth")
    for path in states:
        if not path.is_file():
            raise UserError(f"{at(path)}: no such file")
        yield path
    if (folder / "scaler.pt").exists():
        yield folder / "scaler.pt"
