"""Device, precision and worker processes of a run, where its options leave them open."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clpl_moe.train.arguments import CLPLTrainingArguments

logger = logging.getLogger(__name__)


def choose_device(args: CLPLTrainingArguments) -> None:
    """Set the options that depend on the device: ``use_cpu``, ``bf16``, ``fp16`` and those that follow from them."""
    import torch

    from clpl_moe.encoder.precision import fast_bfloat16

    # Asked for before the parent looks at devices: without it, processes on a machine without accelerators do not
    # find each other.
    if not args.use_cpu and not torch.accelerator.is_available():
        logger.warning("no GPU was found: training on the CPU, where BGE-M3 takes days (use_cpu true: meant so)")
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
    if args.fsdp and args.use_cpu:
        logger.warning("fsdp is for GPUs: these processes hold the whole model each")
    if args.dataloader_num_workers is None:
        args.dataloader_num_workers = 0 if args.use_cpu else 2
    if args.gradient_checkpointing and args.gradient_checkpointing_kwargs is None:
        args.gradient_checkpointing_kwargs = {"use_reentrant": False}


def prefer_activation_checkpointing(args: CLPLTrainingArguments) -> None:
    """Move ``gradient_checkpointing*`` of training arguments to the names of transformers 5.20 and later, where it has
    them; it would warn about the old ones otherwise."""
    if not hasattr(args, "activation_checkpointing"):
        return
    for old, new in (
        ("gradient_checkpointing", "activation_checkpointing"),
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
    ):
        if getattr(args, old) is not None and getattr(args, new) is None:
            setattr(args, new, getattr(args, old))
            setattr(args, old, None)
