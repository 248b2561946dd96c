"""Checks of options that depend on each other or on the machine, and values for those that are left open.

A fault is a ValueError, or the OptionError of one number.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any, cast

from clpl_moe.common.compressed import refuse_no_file
from clpl_moe.common.errors import OptionError, UserError
from clpl_moe.common.options import check_bounds, check_needs
from clpl_moe.train.options import DEV_METRICS, INHERITED_BOUNDS, REFUSED, WITHOUT_EFFECT, LoRAOptions

if TYPE_CHECKING:
    from clpl_moe.train.arguments import CLPLTrainingArguments

logger = logging.getLogger(__name__)


def drop_without_effect(options: Any) -> list[str]:
    """Give options without any effect their defaults again; returns the names of those that had another value."""
    dropped = []
    for field in fields(options):
        if field.name in WITHOUT_EFFECT:
            default = field.default if field.default_factory is MISSING else field.default_factory()
            value = getattr(options, field.name)
            setattr(options, field.name, default)
            # The parser reads a default of "no" as false.
            if value != default and not (default == "no" and value is False):
                dropped.append(field.name)
    return dropped


# Options of transformers that are a JSON text, or a JSON file that it opens.
_FILES = ("accelerator_config", "fsdp_config", "deepspeed")

# Options that cannot be set together, and why.
_EXCLUDING = (
    (
        "grad_cache_tokens",
        "unified_finetuning",
        "only dense embeddings are cached, unified_finetuning needs every token's",
    ),
    ("grad_cache_tokens", "sub_batch_size", "both cut batches into chunks, sub_batch_size saves hardly any memory"),
    ("grad_cache_tokens", "fsdp", "the backward pass needs every parameter whole, and FSDP shards them"),
    *(
        ("frozen_cache_gb", name, "the cache is for packed batches of dense embeddings")
        for name in ("unified_finetuning", "sub_batch_size")
    ),
    *(
        ("frozen_cache_gb", name, "it changes the layers whose outputs would be kept")
        for name in ("fsdp", "deepspeed", "torch_compile")
    ),
)


# Options that have no effect without another one.
_NEEDS = {
    **dict.fromkeys(("dev_split", "metric_for_best_model"), "dev_collection"),
    "use_self_distill": "unified_finetuning",
    "self_distill_start_step": "use_self_distill",
}


def check_options(args: CLPLTrainingArguments) -> None:
    """What transformers and torch would stop at in the middle, take for something else, or not look at."""
    for name, instead in REFUSED:
        if getattr(args, name) != type(args).__dataclass_fields__[name].default:
            raise ValueError(f"{name} is {getattr(args, name)}, and has no effect in this training: {instead}")
    for name in _FILES:
        if isinstance(value := getattr(args, name), str):
            refuse_no_file(value)
    check_bounds(args, INHERITED_BOUNDS)
    for name in ("logging_steps", "save_steps", "eval_steps"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}: choose a number of steps, or a share of all below 1")
    epochs = args.num_train_epochs
    if epochs is not None and not args.max_steps > 0 and not 0 < epochs < math.inf:
        raise ValueError(f"num_train_epochs is {epochs}: choose a number above 0, or set max_steps")
    if args.sub_batch_size is not None and args.sub_batch_size < 1 and args.sub_batch_size != -1:
        raise ValueError(f"sub_batch_size is {args.sub_batch_size}: choose at least 1, or -1 for whole batches")
    if args.negatives_cross_device and not args.in_batch_negatives:
        raise ValueError(
            "negatives_cross_device adds other processes' passages as negatives, in_batch_negatives false forbids even"
            " this process's own: leave out one of the two"
        )
    for first, second, why in _EXCLUDING:
        if not any(getattr(args, name) in (None, False, "", [], -1) for name in (first, second)):
            raise ValueError(f"{first} and {second}: {why}; leave out one of the two")
    if args.frozen_cache_gb and not args.packing:
        raise ValueError("frozen_cache_gb is for packed batches: set packing to true, or frozen_cache_gb to 0")
    if args.guide_margin is not None and not args.mask_duplicates:
        raise ValueError("guide_margin leaves out negatives as mask_duplicates does: set that to true")
    check_needs(args, _NEEDS | {f.name: "ance_refresh" for f in fields(args) if f.name.startswith("ance_")})
    args.loss_options()
    _check_lora(args)
    _check_compiling(args)
    _check_evaluation(args)
    _check_refreshes(args)


def _check_lora(args: CLPLTrainingArguments) -> None:
    """Refuse adapters with what they do not work with, and their options without them."""
    if args.trainable == "lora":
        for name in ("fsdp", "deepspeed", "fix_encoder"):
            if getattr(args, name):
                raise ValueError(f"{name} does not work with trainable lora: leave out one of the two")
        return
    for field in fields(LoRAOptions):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if getattr(args, field.name) != default:
            raise ValueError(f"{field.name} is for adapters: set trainable to lora, or leave it out")


def _check_compiling(args: CLPLTrainingArguments) -> None:
    """Refuse what torch would at the first step."""
    if not args.torch_compile and args.torch_compile_backend is None and args.torch_compile_mode is None:
        return
    import torch

    known = {
        "torch_compile_backend": torch._dynamo.list_backends(exclude_tags=()),
        "torch_compile_mode": list(dict.fromkeys(["default", *torch._inductor.list_mode_options()])),
    }
    for name, choices in known.items():
        if (value := getattr(args, name)) is not None and value not in choices:
            raise ValueError(f"{name} is {value!r}: choose one of {', '.join(choices)}")


def _check_evaluation(args: CLPLTrainingArguments) -> None:
    """Check that options of evaluation fit together, and derive those that follow from others."""
    if args.dev_collection is None:
        args.eval_on_start = args.eval_on_start or False
        if args.merge_base_alpha is not None and len(args.merge_base_alpha) > 1:
            raise OptionError("merge_base_alpha", "found several, expected one, or dev_collection, which decides")
        for name in ("early_stopping_patience", "dev_language"):
            if getattr(args, name) is not None:
                raise ValueError(f"{name} needs a collection to evaluate on: set dev_collection")
        wanted = args.eval_strategy != "no" or args.eval_on_start or args.load_best_model_at_end
        if wanted or args.save_strategy == "best":
            raise ValueError("evaluation in training needs a collection to evaluate on: set dev_collection")
        return
    if len(args.dev_languages) == 1:
        args.dev_language = args.dev_languages[0]  # as configs have always had it
    if args.dev_language is None:
        raise ValueError("dev_collection needs dev_language, the folder within it, such as ko")
    if args.eval_strategy == "no" and args.save_strategy == "best":
        raise ValueError("save_strategy best needs evaluations: set eval_strategy to steps or epoch")
    if args.eval_strategy == "no" and args.save_strategy == "no" and args.early_stopping_patience is not None:
        raise ValueError("early_stopping_patience needs evaluations: set save_strategy or eval_strategy")
    if args.eval_strategy == "no":
        args.eval_strategy, args.eval_steps = args.save_strategy, args.eval_steps or args.save_steps
    if args.save_strategy != "no":
        args.load_best_model_at_end = True
    if args.eval_on_start is None:
        args.eval_on_start = args.eval_strategy != "no"
    if args.greater_is_better is None:
        args.greater_is_better = True
    if (args.metric_for_best_model or "").removeprefix("eval_") not in DEV_METRICS:
        known = ", ".join(DEV_METRICS)
        raise ValueError(f"metric_for_best_model is {args.metric_for_best_model!r}: choose one of {known}")


def _check_refreshes(args: CLPLTrainingArguments) -> None:
    """Check that options of refreshes fit together."""
    if args.ance_refresh is None:
        return
    if args.ance_refresh != "epoch" and not (args.ance_refresh.isdecimal() and int(args.ance_refresh) > 0):
        raise ValueError(f"ance_refresh is {args.ance_refresh!r}: choose epoch, or a number of steps of at least 1")
    for name in ("ance_collection", "ance_language"):
        if getattr(args, name) is None:
            raise ValueError(f"ance_refresh needs {name}: where the passages are that negatives are mined from")
    args.ance_selection()


@functools.cache  # a comparison parses the options of each of its runs
def _warn_of_cpu() -> None:
    logger.warning("no GPU was found: training on the CPU, where BGE-M3 takes days (use_cpu true: meant so)")


def choose_device(args: CLPLTrainingArguments) -> None:
    """Set device, precision, worker processes and what follows from them, where the options leave them open."""
    import torch

    from clpl_moe.encoder.precision import fast_bfloat16

    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:  # accelerate launch --cpu --num_processes 2
        logger.warning(
            "several processes were asked for, and this is the only one: start them by torchrun --nproc_per_node N"
            " -m clpl_moe.train ..."
        )
    # Asked for before the parent looks at devices: without it, processes on a machine without accelerators do not
    # find each other.
    if not args.use_cpu and not torch.accelerator.is_available():
        _warn_of_cpu()
        args.use_cpu = True
    accelerator = None if args.use_cpu else torch.accelerator.current_accelerator()
    device = accelerator or torch.device("cpu")
    if args.bf16 is None:
        args.bf16 = not args.fp16 and fast_bfloat16(device)
    elif args.bf16 and not fast_bfloat16(device):
        logger.warning("bf16 is emulated on this %s, and slow: set bf16 false, and fp16 true on a GPU", device.type)
    if args.fp16 and args.use_cpu:
        args.fp16 = False
    if args.logging_nan_inf_filter is None:
        args.logging_nan_inf_filter = args.fp16_asked
    # accelerate launch sets a variable, and no option
    variables = {"fsdp": "ACCELERATE_USE_FSDP", "deepspeed": "ACCELERATE_USE_DEEPSPEED"}
    for name, variable in variables.items():
        if args.use_cpu and (getattr(args, name) or os.environ.get(variable) == "true"):
            logger.warning("%s is for GPUs: these processes hold the whole model each", name)
    if args.dataloader_num_workers is None:
        args.dataloader_num_workers = 0 if args.use_cpu else 2
    if args.gradient_checkpointing and args.gradient_checkpointing_kwargs is None:
        args.gradient_checkpointing_kwargs = {"use_reentrant": False}
    for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        new = old.replace("gradient", "activation")  # in transformers 5.20 and later, which warns about the old names
        if hasattr(args, new) and getattr(args, old) is not None and getattr(args, new) is None:
            setattr(args, new, getattr(args, old))
            setattr(args, old, None)


def check_optimizer(args: CLPLTrainingArguments) -> None:
    """Make optimizer and schedule for one number, since they check options no sooner; raises :class:`UserError`."""
    import torch
    from torch import nn
    from transformers import Trainer, get_scheduler

    name = str(getattr(args.optim, "value", args.optim))
    of_modules = any(family in name for family in ("galore", "apollo", "lomo"))  # they look at the model's own
    steps = args.max_steps if args.max_steps > 0 else 10_000
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, cast(Any, nn.Linear(1, 1) if of_modules else None))
        if of_modules:
            return
        optimizer = kind([nn.Parameter(torch.zeros(1))], **options)
        get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
    except (ValueError, TypeError, ImportError) as error:
        if of_modules and not isinstance(error, ImportError):
            return
        raise UserError(
            f"optimizer {name} or lr_scheduler_type {getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)}:"
            f" {' '.join(str(error).split())}"
        ) from None
    except RuntimeError:  # one that takes no parameters of this kind or device; the real ones may be others
        return
