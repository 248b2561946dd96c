"""Models whose weights, gradients or optimizer states are divided among processes, by FSDP2 or by DeepSpeed's ZeRO.

1. Who divides them is asked of the trainer: ``accelerate launch`` sets an environment variable, and no option of the run.
2. Weights and optimizer states are gathered for what is saved, and divided again when it is loaded. So a checkpoint is
   the model folder of every other run, and goes on with any number of processes, divided or not.
3. Evaluation takes a whole copy of the weights on each device. The processes then share the texts as ever.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from clpl_moe.common.errors import UserError
from clpl_moe.moe.install import find_layers

if TYPE_CHECKING:
    from transformers import Trainer

    from clpl_moe.train.arguments import CLPLTrainingArguments

# What is stored of a parameter in the optimizers that DeepSpeed's functions know.
_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")


def sharding_of(trainer: Trainer) -> str | None:
    """``FSDP2``, ``ZeRO-1`` to ``ZeRO-3``, or None where each process holds the whole model; raises :class:`UserError` for
    what training does not work with."""
    state = trainer.accelerator.state
    if trainer.is_deepspeed_enabled:
        config = state.deepspeed_plugin.hf_ds_config.config
        if found := [name for name in ("optimizer", "scheduler") if name in config]:
            raise UserError(
                f"the DeepSpeed config has {' and '.join(found)}: leave it out, the options of training decide"
            )
        stage = config.get("zero_optimization", {}).get("stage", 0)
        return f"ZeRO-{stage}" if stage else None
    if not trainer.is_fsdp_enabled:
        return None
    if state.fsdp_plugin.fsdp_version != 2:
        raise UserError("FSDP of version 1 does not work with this training: set fsdp_version to 2 (accelerate launch)")
    return "FSDP2"


def check_sharding(args: CLPLTrainingArguments, by: str, experts: bool) -> None:
    """Raise :class:`UserError` for options that do not work where ``by`` divides the model, which has ``experts`` or not."""
    whole = "each process needs every parameter whole"
    refused = {"trainable lora": (args.trainable == "lora", "an adapter's gradients and states are small: take DDP")}
    refused["torch_compile"] = (args.torch_compile, "leave it out")
    refused["frozen_cache_gb"] = (bool(args.frozen_cache_gb), "it would keep outputs of layers that are divided")
    if by in ("FSDP2", "ZeRO-3"):
        refused["grad_cache_tokens"] = (args.grad_cache_tokens is not None, f"in the backward pass {whole}")
    if by == "ZeRO-3":
        refused["a model with experts"] = (experts, "take FSDP2, which divides it as ZeRO-3 does, or ZeRO-2")
    optimizer = str(getattr(args.optim, "value", args.optim))
    refused[f"optim {optimizer}"] = (optimizer not in _OPTIMIZERS, f"take one of {', '.join(_OPTIMIZERS)}")
    for name, (found, why) in refused.items():
        if found:
            raise UserError(f"{name} does not work with {by}: {why}")


def load_models_whole() -> None:
    """Let every process load whole models, also with experts that are copies of other weights: neither FSDP's saving of
    memory, for which other processes than the first load nothing, nor ZeRO-3's, which divides models as they are loaded."""
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def configure_fsdp(plugin: Any, encoder: nn.Module) -> None:
    """Divide an encoder by layers where accelerate has no other order, and keep its weights in float32, which training does
    not round: FSDP2's own mixed precision would round embeddings and loss, too."""
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    plugin.cpu_ram_efficient_loading = False
    plugin.mixed_precision_policy = MixedPrecisionPolicy()
    if plugin.auto_wrap_policy in (None, transformer_auto_wrap_policy) and not plugin.transformer_cls_names_to_wrap:
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
        parts = [*find_layers(encoder), getattr(encoder, "embeddings", None)]
        plugin.transformer_cls_names_to_wrap = list({type(part).__name__ for part in parts if part is not None})


class WholeCopy:
    """A model's modules a second time, which have weights within :meth:`filled` only.

    Args:
        model: before anything divides it.
    """

    def __init__(self, model: nn.Module) -> None:
        empty = {
            id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
            for parameter in model.parameters()
        }
        self.model: Any = copy.deepcopy(model, empty).eval()

    @contextlib.contextmanager
    def filled(self, weights: dict[str, Tensor], device: torch.device | str) -> Iterator[Any]:
        """The model on a device, with these weights."""
        model = self.model
        model.load_state_dict(weights, assign=True)
        try:
            yield model.to(device)
        finally:
            for module in model.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    setattr(module, name, nn.Parameter(parameter.to("meta"), requires_grad=False))


def whole(parameter: Tensor) -> Tensor:
    """A parameter with all its parts, float32 where it is trained in float32; all processes have to call this."""
    found: Any = parameter.detach()
    if isinstance(found, DTensor):
        return found.full_tensor()
    if not _by_deepspeed(parameter):
        return found
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    if parameter.requires_grad and (master := safe_get_full_fp32_param(parameter)) is not None:
        return master.detach()
    if not hasattr(parameter, "ds_id"):
        return found
    with GatheredParameters([parameter]):
        return parameter.detach().clone()


def whole_weights(model: nn.Module, keep: Callable[[Tensor], Tensor | None]) -> dict[str, Tensor]:
    """The whole weights and buffers of a model by name, each as ``keep`` returns it, or none; all processes have to call
    this, and only those hold a second model whose ``keep`` says so."""
    names = set(model.state_dict())
    found: dict[str, Tensor] = {}
    for named in (model.named_parameters(), model.named_buffers()):
        for name, value in named:
            if name in names and (kept := keep(whole(value))) is not None:
                found[name] = kept
    return found


def put_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give a divided model whole weights, which every process has; in place."""
    for name, parameter in model.named_parameters():
        value = weights[name].to(parameter.dtype)
        with torch.no_grad():
            if isinstance(parameter, DTensor):
                parameter.copy_(_divided(value, parameter))
            elif not _by_deepspeed(parameter):
                parameter.copy_(value)
            elif parameter.requires_grad:
                from deepspeed.utils import safe_set_full_fp32_param

                safe_set_full_fp32_param(parameter, weights[name].float())
                if not hasattr(parameter, "ds_id"):
                    parameter.copy_(value)


def optimizer_state(optimizer: Any, groups: list[list[nn.Parameter]], keep: bool) -> dict[str, Any] | None:
    """The state of an optimizer as it would be in one process, on the CPU; None without ``keep``. All processes have to call
    this. ``groups`` are the trained parameters in the order in which the optimizer was given them."""
    if not any(_by_deepspeed(p) for group in groups for p in group):

        def on_cpu(value: Tensor) -> Tensor | None:
            found = whole(value)
            return found.cpu() if keep else None

        state = tree_map_only(Tensor, on_cpu, optimizer.state_dict())
        return state if keep else None
    from deepspeed.utils import safe_get_full_optimizer_state

    flat = optimizer.optimizer
    _link(flat)
    names = {name for state in flat.state.values() for name, value in state.items() if getattr(value, "ndim", 0) > 0}
    steps = [state["step"] for state in flat.state.values() if "step" in state]
    found: dict[int, dict[str, Any]] = {}
    for number, parameter in enumerate(p for group in groups for p in group):
        values = {name: safe_get_full_optimizer_state(parameter, name) for name in sorted(names)}
        if keep and values:
            found[number] = {name: value.cpu() for name, value in values.items()}
            found[number] |= {"step": torch.tensor(float(steps[0]))} if steps else {}  # its own: it is counted in place
    numbers = iter(range(len(found) or sum(map(len, groups))))
    of_groups = [
        {name: value for name, value in options.items() if name != "params"}
        | {"params": [next(numbers) for _ in group]}
        for options, group in zip(flat.param_groups, groups, strict=True)
    ]
    return {"state": found, "param_groups": of_groups} if keep else None


def load_optimizer_state(optimizer: Any, groups: list[list[nn.Parameter]], state: dict[str, Any]) -> None:
    """Give an optimizer of a divided model the state that :func:`optimizer_state` made, or an optimizer in one process; raises
    ValueError where it is another optimizer's."""
    by_number = state["state"]
    if not any(_by_deepspeed(p) for group in groups for p in group):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        divided = {
            number: {
                name: _divided(value, parameters[number]) if isinstance(value, Tensor) and value.ndim else value
                for name, value in values.items()
            }
            for number, values in by_number.items()
        }
        optimizer.load_state_dict(state | {"state": divided})
        return
    from deepspeed.utils import safe_set_full_optimizer_state

    flat = optimizer.optimizer
    order = [p for group in groups for p in group]
    if [len(group["params"]) for group in state["param_groups"]] != [len(group) for group in groups]:
        raise ValueError("the groups of parameters are others")
    first: dict[str, Tensor] = next(iter(by_number.values()), {})
    for of_group in getattr(flat, "fp32_partitioned_groups_flat", None) or flat.single_partition_of_fp32_groups:
        for name, value in first.items():  # there is none before the first step
            flat.state[of_group][name] = torch.zeros_like(of_group) if value.ndim else value.clone()
    _link(flat)
    for number, values in by_number.items():
        for name, value in values.items():
            if value.ndim:
                value = _divided(value, order[int(number)]) if not hasattr(order[int(number)], "ds_id") else value
                safe_set_full_optimizer_state(order[int(number)], value.to(order[int(number)].device), name)
    for group, options in zip(flat.param_groups, state["param_groups"], strict=True):
        group.update({name: value for name, value in options.items() if name != "params"})


def _link(flat: Any) -> None:
    """Let ZeRO-1 and 2 find the states of all groups of parameters: after its first step DeepSpeed knows the first group's."""
    if hasattr(flat, "_lazy_init_hp_params_optimizer_state") and flat.state:
        flat._hp_optimizer_states_linked = False
        flat._lazy_init_hp_params_optimizer_state()


def whole_size(parameter: Tensor) -> int:
    """Numbers in a parameter with all its parts."""
    return getattr(parameter, "ds_numel", parameter.numel())


def is_divided(model: nn.Module) -> bool:
    """Whether a model has been divided by now."""
    return any(isinstance(p, DTensor) or _by_deepspeed(p) for p in model.parameters())


def _divided(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, which every process has, divided as a parameter is."""
    if value.shape != parameter.shape:
        raise ValueError(f"found {tuple(value.shape)}, the parameter is {tuple(parameter.shape)}")
    if not isinstance(parameter, DTensor):
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _by_deepspeed(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")
