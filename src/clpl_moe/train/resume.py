"""Checks before a run: is its folder free, and does a resumed run have the options and the data of its checkpoint?

A run folder keeps its options in ``train_config.yaml`` and the digests of its data in ``train_data.json``.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from clpl_moe.common.errors import UserError, at
from clpl_moe.common.files import read_json, refuse_unwritable, resolved
from clpl_moe.common.output import WORK_FOLDER
from clpl_moe.common.yaml_files import load_yaml
from clpl_moe.data.formats import data_files
from clpl_moe.train.arguments import CLPLDataArguments, CLPLTrainingArguments
from clpl_moe.train.callbacks import progress
from clpl_moe.train.checkpoint import STATE_FILE, checkpoints, fault, in_the_way, is_unfinished, read_state
from clpl_moe.train.metrics_file import METRICS_FILE
from clpl_moe.train.options import WITHOUT_EFFECT

logger = logging.getLogger(__name__)

CONFIG_FILE = "train_config.yaml"
DATA_FILE = "train_data.json"

# Weights and optimizer state of a checkpoint do not fit a run that changes one of these.
_FIXED_IN_A_RUN = (
    "num_experts", "top_k", "moe_target", "moe_layers", "router", "trainable", "frozen_layers", "unified_finetuning",
    "lora_rank", "lora_alpha", "lora_targets",
    "colbert_dim", "fix_encoder", "fix_position_embedding",
    # Part of the optimizer's and the schedule's state, which come back with their old values.
    "optim", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
    # They decide which examples an epoch has, and their order: some would come twice, others never.
    "seed", "data_seed", "same_dataset_within_batch", "small_threshold", "drop_threshold", "max_example_num_per_dataset",
    "dataloader_drop_last", "distinct_batches",
)  # fmt: skip


# Options that a run settles by its model and its data, unless they are given.
_LEFT_OPEN = ("frozen_layers", "merge_experts", "merge_base_alpha", "num_train_epochs")

# Defaults before there was one recipe, when runs did not know frozen_cache_gb: a run of then, which did not have these options
# given, goes on with them.
_DEFAULTS_BEFORE: dict[str, object] = {
    "trainable": "moe", "moe_target": "intermediate", "moe_layers": "all", "train_group_size": 8, "queries_per_negative": 1,
    "temperature": 0.02, "penalty": "cosine", "penalty_weight": 0.1, "learning_rate": 5e-5, "warmup_steps": 0,
    "weight_decay": 0.0,
}  # fmt: skip


# What changes nothing in a run that resumes.
_OF_THE_START = ("output_dir", "dry_run", "stop_on_sigusr1", "eval_on_start")

# How a step's batch is divided. It may change, except in checkpoints of before, whose order depends on it.
_DIVISION = ("per_device_train_batch_size", "gradient_accumulation_steps")


def check_output_dir(args: CLPLTrainingArguments) -> None:
    """Resolve ``resume_from_checkpoint: true``; refuse a folder that holds anything but the run to resume, and a checkpoint
    that is none."""
    output_dir, resume = args.folder, args.resume_from_checkpoint
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"{at(output_dir)}: a file is in the way of the run folder; name another output_dir")
    refuse_unwritable(output_dir / CONFIG_FILE)
    for path in output_dir.iterdir() if output_dir.exists() else ():
        is_folder = path.is_dir() and path.name not in (CONFIG_FILE, DATA_FILE, METRICS_FILE, STATE_FILE)
        if path.exists() and not path.is_file() and not is_folder:
            raise UserError(f"{at(path)}: not a file, and in the way of the run's; remove it")
    for path in in_the_way(output_dir):
        raise UserError(f"{at(path)}: not a folder, and in the way of a checkpoint; remove it")
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
    elif resolved(resume) == resolved(output_dir):
        raise UserError(f"{at(resume)}: a run, and no checkpoint; resume_from_checkpoint true goes on with its newest")
    elif resolved(resume).parent != resolved(output_dir) and _holds_anything(output_dir):
        raise UserError(
            f"{at(output_dir)}: the folder is not empty, and not the run that {resume} belongs to; name another output_dir"
        )
    checkpoint = args.resume_from_checkpoint
    if checkpoint is not None and (found := fault(checkpoint)) is not None:
        raise UserError(f"{found}; the checkpoint cannot be resumed from, name another one")
    # DeepSpeed and FSDP have names of their own.
    if checkpoint is not None and not any(any(Path(checkpoint).glob(name)) for name in ("optimizer*", "global_step*")):
        raise UserError(
            f"{at(checkpoint)}: holds no state of an optimizer (a run's folder, or made with save_only_model), so that it"
            f" cannot be resumed; begin a new run with its weights: model_name_or_path {checkpoint}"
        )


def keep_options(*groups: Any) -> None:
    """Give options that are not given the values of the run to resume, where they depend on base model or data, or had other
    defaults before; in a new run, mix with the base model where there is evaluation."""
    args = groups[-1]
    path = None if args.resume_from_checkpoint is None else Path(args.resume_from_checkpoint).parent / CONFIG_FILE
    before = dict.fromkeys(_LEFT_OPEN) | load_yaml(path) if path is not None and path.is_file() else {}
    earlier = {} if "frozen_cache_gb" in before else _DEFAULTS_BEFORE
    for group in groups:
        for field in dataclasses.fields(group):
            known = before.get(field.name, earlier)
            kept = field.name in _LEFT_OPEN or known == earlier.get(field.name, before)
            if field.name in before and kept and getattr(group, field.name) == field.default:
                setattr(group, field.name, known)
    if not before and args.merge_base_alpha is None and args.eval_strategy != "no":
        args.merge_base_alpha = [0.5, 0.75]


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


def batches_of_whole_steps(args: CLPLTrainingArguments) -> bool:
    """Whether batches are planned for whole optimizer steps. A checkpoint of before goes on in its own order, which was
    planned for single passes; without accumulation the two are the same."""
    checkpoint = args.resume_from_checkpoint
    if checkpoint is None or "whole_steps" in (known := progress(read_state(checkpoint))):
        return checkpoint is None or known["whole_steps"]
    config = Path(checkpoint).parent / CONFIG_FILE
    before = load_yaml(config) if config.is_file() else {}
    return before.get("gradient_accumulation_steps", args.gradient_accumulation_steps) == 1


def check_same_run(config: dict[str, object], checkpoint: str | Path, whole_steps: bool = True) -> None:
    """Compare the options of a resumed run with those of its checkpoint, where these are still known: refuse one that the
    checkpoint does not fit, and warn of those that only change the result. ``whole_steps`` is
    :func:`batches_of_whole_steps`."""
    path = Path(checkpoint).parent / CONFIG_FILE
    if not path.is_file():
        return
    before = {"distinct_batches": False, "frozen_cache_gb": 0.0} | load_yaml(path)  # runs of before did not know them
    names = sorted((before.keys() | config.keys()) - {*_OF_THE_START, *WITHOUT_EFFECT})
    changed = {name: (before.get(name), config.get(name)) for name in names if before.get(name) != config.get(name)}
    for name in (*_FIXED_IN_A_RUN, *(() if whole_steps else _DIVISION)):
        if name in changed and name in before:
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
        "files": [[file.name, file.digest()] for file in data_files(data_args.train_data)],
        "processes": world,
        "batch_of_all": world * training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps,
    }


def check_same_data(now: dict[str, Any], checkpoint: str | Path, whole_steps: bool = True) -> None:
    """Compare :func:`describe_data` of a resumed run with the run of its checkpoint; another path is no difference. Refuse
    other contents or another batch: an epoch would have some examples twice, others never."""
    path = Path(checkpoint).parent / DATA_FILE
    try:
        before = read_json(path, dict)
        digests = [str(digest) for _, digest in before["files"]]
        processes, batch = int(before["processes"]), int(before["batch_of_all"])
    except FileNotFoundError:
        return
    except (UserError, KeyError, TypeError, ValueError, OSError):
        raise UserError(
            f"{at(path)}: cannot be read, though the run to resume wrote it; restore or remove it"
        ) from None
    if digests != [digest for _, digest in now["files"]]:
        new = [name for name, digest in now["files"] if digest not in digests]
        raise UserError(
            f"{at(new[0]) if new else 'train_data'}: not the data of the run to resume, as {path} lists them: put these"
            " back, or begin a new run on the new data, from this one's weights if you like: model_name_or_path"
            f" {checkpoint} and another output_dir"
        )
    other = processes != now["processes"]
    was = f"{now['processes']} processes, but the run to resume had {processes}"
    if batch != now["batch_of_all"]:
        raise UserError(
            f"{was if other else 'another batch than that of the run to resume'}, and {batch} examples a step where now"
            f" there are {now['batch_of_all']}: start as many processes, or choose per_device_train_batch_size and"
            " gradient_accumulation_steps for the same number"
        )
    if other and not whole_steps:
        raise UserError(
            f"{was}, and its version planned batches for single passes: start as many processes, or begin a new run with"
            f" its weights: model_name_or_path {checkpoint} and another output_dir"
        )
    if other:
        logger.warning(
            "%s: the batches are the same, but dropout, other random draws and each process's in-batch negatives are not",
            was,
        )


def newest_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest whole checkpoint of a run; None where a killed run left unfinished ones only, or none.

    Raises:
        UserError: there are damaged ones, and none is whole.
    """
    damaged = []
    for folder in checkpoints(Path(output_dir)):
        if (found := fault(folder)) is None:
            return folder
        logger.warning("%s: this checkpoint is left out", found)
        if not is_unfinished(folder):
            damaged.append(found)
    if damaged:
        raise UserError(f"{damaged[0]}; no checkpoint of the run is whole, begin a new one in another output_dir")
    return None
