"""LoRA: small matrices beside the weights are trained, and the weights stay (E. Hu et al., arXiv:2106.09685), by peft.

Experts are parameters of three dimensions, which peft adapts only where it is told their names (``target_parameters``); its
``all-linear`` leaves them out without a word. Routers are trained whole, since there is nothing to keep of them.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from clpl_moe.common.errors import OptionError, UserError
from clpl_moe.encoder.adapter import adapter_config, has_adapter
from clpl_moe.moe.experts import Experts
from clpl_moe.moe.inject import has_experts
from clpl_moe.moe.install import find_layers
from clpl_moe.moe.router import Router
from clpl_moe.train.arguments import CLPLTrainingArguments


def add_lora(encoder: PreTrainedModel, args: CLPLTrainingArguments) -> None:
    """Put adapters into the layers of an encoder that are not frozen, in place; nothing else has gradients then.

    Raises:
        UserError: the encoder has no such layers, or no experts where these are asked for, or experts that nothing would train;
            an option that experts cannot have.
    """
    from peft import LoraConfig, inject_adapter_in_model

    try:
        layers = find_layers(encoder)
    except ValueError as error:
        raise UserError(str(error)) from None
    targets = set(args.lora_targets)
    if has_experts(encoder):
        if not targets & {"ffn", "experts"}:
            raise OptionError(
                "lora_targets",
                f"found {' '.join(args.lora_targets)}, which leaves out the experts: add experts, or set num_experts 0",
            )
        if args.lora_dropout > 0:
            raise OptionError(
                "lora_dropout", f"found {args.lora_dropout}, expected 0 with experts: peft has none for them"
            )
    elif targets == {"experts"}:
        raise OptionError("lora_targets", "found experts and a model without any, expected num_experts above 0")
    names = {module: name for name, module in encoder.named_modules()}
    linears: list[str] = []
    experts: list[str] = []
    routers: list[str] = []
    for layer in layers[args.frozen_layers or 0 :]:
        for module in layer.modules():
            name = names[module]
            if isinstance(module, Router) and any(True for _ in module.parameters()):
                routers.append(name)
            elif isinstance(module, Experts):
                experts.append(f"{name}.weight")
            elif isinstance(module, nn.Linear):
                kind = "attention" if name.startswith(f"{names[layer.attention]}.") else "ffn"
                linears += [name] if kind in targets else []
    if not linears and not experts:
        return  # all layers are frozen, of which others tell
    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=linears,
        target_parameters=experts or None,
        modules_to_save=routers or None,
    )
    inject_adapter_in_model(config, encoder)


def adapted_experts(encoder: PreTrainedModel) -> int:
    """How many weights of experts have adapters: in a training step, peft adds these up anew, and the sums are kept for the
    backward pass."""
    experts = [(name, module) for name, module in encoder.named_modules() if isinstance(module, Experts)]
    return sum(module.weight.numel() for name, module in experts if name.endswith(".base_layer"))


def name_base(encoder: PreTrainedModel, path: str, revision: str | None) -> None:
    """Name the model that an adapter belongs to, from which it is loaded again."""
    if has_adapter(encoder):
        config = adapter_config(encoder)
        config.base_model_name_or_path, config.revision = path, revision
