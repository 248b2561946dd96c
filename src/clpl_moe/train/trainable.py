"""Which parameters are trained."""

from __future__ import annotations

from transformers import PreTrainedModel

from clpl_moe.common.errors import UserError
from clpl_moe.moe.inject import expert_parameters, ffn_parameters, has_experts
from clpl_moe.moe.install import find_layers
from clpl_moe.train.arguments import CLPLTrainingArguments


def choose_trainable(encoder: PreTrainedModel, args: CLPLTrainingArguments) -> None:
    """Leave gradients only where ``trainable``, ``frozen_layers`` and FlagEmbedding's ``fix_*`` options want them.

    Raises:
        UserError: ``moe`` for a model without experts, ``frozen_layers`` that the encoder does not have, or nothing would
            be trained.
    """
    try:
        _choose(encoder, args)
    except ValueError as error:
        raise UserError(str(error)) from None


def _choose(encoder: PreTrainedModel, args: CLPLTrainingArguments) -> None:
    if args.trainable == "moe" and not has_experts(encoder):
        raise ValueError(
            "trainable is moe but the model has no experts: set num_experts to 2 or more, or trainable to full"
        )
    if args.trainable != "full":
        chosen = expert_parameters(encoder) if args.trainable == "moe" else ffn_parameters(encoder)
        encoder.requires_grad_(False)
        for _, parameter in chosen:
            parameter.requires_grad_(True)
    for name, parameter in encoder.named_parameters():
        positions = args.fix_position_embedding and "position_embeddings" in name
        # Nothing that is trained uses the pooling layer.
        if args.fix_encoder or positions or name.startswith("pooler."):
            parameter.requires_grad_(False)
    if args.frozen_layers:
        layers = find_layers(encoder)
        if args.frozen_layers > len(layers):
            raise ValueError(f"frozen_layers is {args.frozen_layers}: found {len(layers)} layers in the encoder")
        for part in (encoder.embeddings, *layers[: args.frozen_layers]):
            part.requires_grad_(False)
    if not args.unified_finetuning and not any(parameter.requires_grad for parameter in encoder.parameters()):
        raise ValueError(
            "nothing would be trained: fix_encoder without unified_finetuning, or frozen_layers, leaves no parameters"
        )
