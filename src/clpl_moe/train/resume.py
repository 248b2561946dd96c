"""Checks before a run: is its folder free, and does a resumed run have the options and the data of its checkpoint?

A run folder keeps its options in ``train_config.yaml`` and the digests of its data in ``train_data.json``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from clpl_moe.common.cli import load_yaml
from clpl_moe.common.errors import UserError, at
from clpl_moe.common.files import hash_file, read_json, refuse_unwritable
from clpl_moe.common.output import WORK_FOLDER
from clpl_moe.data.schema import data_files
from clpl_moe.train.arguments import CLPLDataArguments, CLPLTrainingArguments
from clpl_moe.train.options import WITHOUT_EFFECT

logger = logging.getLogger(__name__)

CONFIG_FILE = "train_config.yaml"
DATA_FILE = "train_data.json"

# Weights and optimizer state of a checkpoint do not fit a run that changes one of these.
_FIXED_IN_A_RUN = (
    "num_experts", "top_k", "moe_target", "moe_layers", "router", "trainable", "frozen_layers", "unified_finetuning",
    "colbert_dim", "fix_encoder", "fix_position_embedding",
    # Part of the optimizer's and the schedule's state, which come back with their old values.
    "optim", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
)  # fmt: skip


def check_output_dir(args: CLPLTrainingArguments) -> None:
    """Resolve ``resume_from_checkpoint: true``; refuse a folder that holds anything but the run to resume, and a checkpoint
    that is none."""
    output_dir, resume = args.folder, args.resume_from_checkpoint
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"{at(output_dir)}: a file is in the way of the run folder; name another output_dir")
    refuse_unwritable(output_dir / CONFIG_FILE)
    if resume is None:
        if _holds_anything(output_dir):
            raise UserError(
                f"{at(output_dir)}: the folder is not empty; name another output_dir, or set resume_from_checkpoint true to go"
                " on with the run in it"
            )
    elif resume.lower() == "true":
        newest = newest_checkpoint(output_dir)
        # A run that was killed before its first checkpoint starts again from the beginning.
        if newest is None and _holds_anything(output_dir) and not (output_dir / CONFIG_FILE).exists():
            raise UserError(f"{at(output_dir)}: no run to resume, found neither a checkpoint nor {CONFIG_FILE}")
        args.resume_from_checkpoint = None if newest is None else str(newest)
    elif not (Path(resume) / "trainer_state.json").is_file():
        raise UserError(f"{at(resume)}: resume_from_checkpoint names no checkpoint of a run (no trainer_state.json)")
    elif Path(resume).resolve() == output_dir.resolve():
        raise UserError(f"{at(resume)}: a run, and no checkpoint; resume_from_checkpoint true goes on with its newest")
    elif Path(resume).resolve().parent != output_dir.resolve() and _holds_anything(output_dir):
        raise UserError(
            f"{at(output_dir)}: the folder is not empty, and not the run that {resume} belongs to; name another output_dir"
        )
    checkpoint = args.resume_from_checkpoint
    # DeepSpeed and FSDP have names of their own.
    if checkpoint is not None and not any(any(Path(checkpoint).glob(name)) for name in ("optimizer*", "global_step*")):
        raise UserError(
            f"{at(checkpoint)}: holds no state of an optimizer (a run's folder, or made with save_only_model), so that it"
            f" cannot be resumed; begin a new run with its weights: model_name_or_path {checkpoint}"
        )


def _holds_anything(output_dir: Path) -> bool:
    """Whether a folder holds more than what a killed process left before its run began."""
    return output_dir.exists() and any(path.name != WORK_FOLDER for path in output_dir.iterdir())


def resolved_config(*groups: Any) -> dict[str, object]:
    """All options of the argument dataclasses as plain values, without secrets, as ``--config`` reads them."""
    fields = [(group, field.name) for group in groups for field in dataclasses.fields(group) if field.init]
    values = {name: getattr(group, name) for group, name in fields if name != "token" and not name.endswith("_token")}
    values.pop("resume_from_checkpoint", None)
    # An empty list is the default of every option that takes one, but for this one's.
    values["report_to"] = values.get("report_to") or "none"
    values = {name: value for name, value in values.items() if value != []}
    return json.loads(json.dumps(values, default=lambda v: v.to_dict() if hasattr(v, "to_dict") else str(v)))


def check_same_run(config: dict[str, object], checkpoint: str | Path) -> None:
    """Compare the options of a resumed run with those of its checkpoint, where these are still known: refuse one that the
    checkpoint does not fit, and warn of those that only change the result."""
    path = Path(checkpoint).parent / CONFIG_FILE
    if not path.is_file():
        return
    before = load_yaml(path)
    names = sorted((before.keys() | config.keys()) - {"output_dir", "dry_run", *WITHOUT_EFFECT})
    changed = {name: (before.get(name), config.get(name)) for name in names if before.get(name) != config.get(name)}
    for name in _FIXED_IN_A_RUN:
        if name in changed:
            old, new = changed[name]
            raise UserError(
                f"{name} is {new}, but the run to resume has {old} ({path}): resume it with that, or begin a new run with"
                f" its weights: model_name_or_path {checkpoint} and another output_dir"
            )
    if changed:
        what = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in changed.items())
        logger.warning("resumed with other options than %s: %s", path, what)


def describe_data(data_args: CLPLDataArguments, training_args: CLPLTrainingArguments) -> dict[str, Any]:
    """The contents of the files and the number of processes, which besides the options decide the order of the examples."""
    world = training_args.world_size
    return {
        "files": [[str(path), hash_file(path)] for path in data_files(data_args.train_data)],
        "processes": world,
        "batch_of_all": world * training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps,
    }


def check_same_data(now: dict[str, Any], checkpoint: str | Path) -> None:
    """Compare :func:`describe_data` of a resumed run with the run of its checkpoint; another path is no difference. Refuse
    other contents or another batch: an epoch would have some examples twice, others never."""
    path = Path(checkpoint).parent / DATA_FILE
    try:
        before = read_json(path, dict)
        files, processes, batch = before["files"], before["processes"], before["batch_of_all"]
    except FileNotFoundError:
        return
    except (UserError, KeyError):
        raise UserError(
            f"{at(path)}: cannot be read, though the run to resume wrote it; restore or remove it"
        ) from None
    if [digest for _, digest in files] != [digest for _, digest in now["files"]]:
        known = {digest for _, digest in files}
        new = [name for name, digest in now["files"] if digest not in known]
        raise UserError(
            f"{at(new[0]) if new else 'train_data'}: not the data of the run to resume, as {path} lists them: put these"
            " back, or begin a new run on the new data, from this one's weights if you like: model_name_or_path"
            f" {checkpoint} and another output_dir"
        )
    if processes == now["processes"]:
        return
    was = f"{now['processes']} processes, but the run to resume had {processes}"
    if batch != now["batch_of_all"]:
        raise UserError(
            f"{was}, and {batch} examples a step where now there are {now['batch_of_all']}: start as many processes, or"
            " choose per_device_train_batch_size and gradient_accumulation_steps for the same number"
        )
    logger.warning("%s: the batches are the same, but dropout and other random draws are not", was)


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint of a run that was written to its end; a killed run may leave one that was not."""
    found = {}
    for folder in Path(output_dir).glob("checkpoint-*"):
        with contextlib.suppress(OSError, ValueError, UserError):
            # Written last, so that what comes before it is whole where this can be read.
            read_json(folder / "trainer_state.json", dict)
            found[int(folder.name.removeprefix("checkpoint-"))] = folder
    return found[max(found)] if found else None
