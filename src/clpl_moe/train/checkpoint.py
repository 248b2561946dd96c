"""Is a checkpoint whole? Told from all its files; weights and the optimizer's tensors are mapped, not read.

A killed run leaves an unfinished checkpoint, a full disk or a careless hand a damaged one.
"""

from __future__ import annotations

import json
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

from clpl_moe.common.errors import UserError, at
from clpl_moe.common.files import read_json, read_jsonl
from clpl_moe.encoder.weights import HEAD_FILES, weight_names
from clpl_moe.train.ance import NEGATIVES_FILE
from clpl_moe.train.callbacks import progress

STATE_FILE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-([0-9]+)")
_NUMBER = (int, float)


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
    for name, kinds in _STATE.items():
        if not _is(values.get(name), kinds):
            expected = "a step of at least 1" if name == "global_step" else " or ".join(k.__name__ for k in kinds)
            raise UserError(f"{at(path, field=name)}: found {json.dumps(values.get(name))[:60]}, expected {expected}")
    if values["global_step"] < 1 or any(not isinstance(record, dict) for record in values["log_history"]):
        raise UserError(f"{at(path)}: no state of a training after its first step")
    try:
        state = TrainerState.load_from_json(str(path))
        known = progress(state)
        for data in (state.stateful_callbacks or {}).values():
            for one in data if isinstance(data, list) else [data]:
                dict(one.get("args", {})), dict(one.get("attributes", {}))
        if known:
            _check_progress(known)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise UserError(f"{at(path)}: no state of a trainer ({' '.join(str(error).split())})") from None
    named = _NAME.fullmatch(Path(checkpoint).name)
    if named and int(named[1]) != state.global_step:
        raise UserError(f"{at(path)}: is of step {state.global_step}, the folder is {Path(checkpoint).name}")
    return state


_STATE: dict[str, tuple[type, ...]] = {
    "global_step": (int,),
    "log_history": (list,),
    "epoch": (*_NUMBER, type(None)),
    "total_flos": _NUMBER,
    **dict.fromkeys(("max_steps", "num_train_epochs", "num_input_tokens_seen"), (int,)),
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), _NUMBER),
    **dict.fromkeys(("train_batch_size", "best_global_step"), (int, type(None))),
    "best_metric": (*_NUMBER, type(None)),
    "best_model_checkpoint": (str, type(None)),
    "stateful_callbacks": (dict, type(None)),
}


def _is(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)


def _check_progress(known: dict[str, Any]) -> None:
    for name in ("total_loss", "loss"):
        float(known[name])
    for name in ("first_step", "last_logged"):
        if not _is(known[name], (int,)):
            raise TypeError(f"{name} is {known[name]!r}")
    for total, weights in dict(known["terms"]).values():
        torch.tensor(total, dtype=torch.float64) / float(weights)


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
    read_state(folder)
    if any(folder.glob("global_step*")) or any(folder.glob("*fsdp*")) or (folder / "optimizer_0").is_dir():
        return  # DeepSpeed's and FSDP's, which they read themselves
    weight_names(str(folder), {})
    for path in _torch_files(folder):
        try:
            with safe_globals():  # numpy's, of random states
                values = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
            if not isinstance(values, dict):
                raise TypeError(f"found a {type(values).__name__}, expected a dict")
            _check_content(path.name, values)
        except Exception as error:  # a file of any content may raise anything
            why = " ".join(str(error).split(". ")[0].split()) or type(error).__name__
            raise UserError(f"{at(path)}: damaged ({why[:200]})") from None
    if (folder / NEGATIVES_FILE).exists():
        _check_negatives(folder / NEGATIVES_FILE)


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


def _check_content(name: str, values: dict[str, Any]) -> None:
    if name == "optimizer.pt":
        groups = [list(group["params"]) for group in values["param_groups"]]
        if not set(values["state"]) <= {number for group in groups for number in group}:
            raise ValueError("states of parameters that are in no group")
        if not all(isinstance(state, dict) for state in values["state"].values()):
            raise TypeError("a parameter's state is no dict")
    elif name == "scheduler.pt":
        if not _is(values["last_epoch"], (int,)) or not all(_is(rate, _NUMBER) for rate in values["_last_lr"]):
            raise TypeError("no state of a schedule")
    elif name.startswith("rng_state"):
        random.Random().setstate(values["python"])
        np.random.RandomState().set_state(values["numpy"])
        torch.Generator().set_state(values["cpu"])


def _check_negatives(path: Path) -> None:
    for number, (line, record) in enumerate(read_jsonl(path)):
        if number == 0:
            whole = _is(record.get("step"), (int,))
        else:
            ids = record.get("neg_ids")
            whole = _is(record.get("example"), (int,)) and isinstance(ids, list) and all(_is(i, (str,)) for i in ids)
        if not whole:
            expected = "an example and its neg_ids" if number else "the step of the refresh"
            raise UserError(f"{at(path, line)}: found {', '.join(record)}, expected {expected}")
