"""Which parameters are trained."""

from __future__ import annotations

from transformers import PreTrainedModel

from clpl_moe.moe.inject import expert_parameters, ffn_parameters, has_experts
from clpl_moe.moe.install import find_layers


def choose_trainable(
    encoder: PreTrainedModel,
    trainable: str,
    *,
    fix_position_embedding: bool = False,
    fix_encoder: bool = False,
    frozen_layers: int = 0,
    heads: bool = False,
) -> None:
    """Leave gradients only where they are wanted.

    Args:
        encoder: changed in place.
        trainable: ``moe`` (experts and routers), ``ffn`` (all FFN Linear layers, experts and routers) or ``full``.
        fix_position_embedding: FlagEmbedding's option, freezes these too.
        fix_encoder: FlagEmbedding's option, leaves only its heads to train.
        frozen_layers: so many of the lowest layers stay as they are, and where it is above 0, the embeddings.
        heads: whether FlagEmbedding's heads are trained too.

    Raises:
        ValueError: ``moe`` for a model without experts, ``frozen_layers`` that the encoder does not have, or nothing would
            be trained.
    """
    if trainable == "moe" and not has_experts(encoder):
        raise ValueError(
            "trainable is moe but the model has no experts: set num_experts to 2 or more, or trainable to full"
        )
    if trainable != "full":
        chosen = expert_parameters(encoder) if trainable == "moe" else ffn_parameters(encoder)
        encoder.requires_grad_(False)
        for _, parameter in chosen:
            parameter.requires_grad_(True)
    for name, parameter in encoder.named_parameters():
        # Nothing that is trained uses the pooling layer.
        if fix_encoder or name.startswith("pooler.") or (fix_position_embedding and "position_embeddings" in name):
            parameter.requires_grad_(False)
    if frozen_layers:
        layers = find_layers(encoder)
        if frozen_layers > len(layers):
            raise ValueError(f"frozen_layers is {frozen_layers}: found {len(layers)} layers in the encoder")
        for part in (encoder.embeddings, *layers[:frozen_layers]):
            part.requires_grad_(False)
    if not heads and not any(parameter.requires_grad for parameter in encoder.parameters()):
        raise ValueError(
            "nothing would be trained: fix_encoder without unified_finetuning, or frozen_layers, leaves no parameters"
        )
