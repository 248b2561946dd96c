"""Attention of texts of one length on any device, the faster way."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clpl_moe.encoder.precision import fast_bfloat16


def attention(query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> Tensor:
    """Scaled dot product attention without a mask.

    In bfloat16 on a CPU that is fast at it, product, softmax and product take half the time of torch's own, forward and
    backward, and of short texts a quarter (``benchmarks/results/attention_avx512.json``). In float32, and on CPUs without
    such instructions, torch's own is faster. The products keep the probabilities for the backward pass, two bytes a head and
    pair of tokens.

    Args:
        query: (n, heads, length or 1, d).
        key: (n, heads, length, d).
        value: (n, heads, length, d).
        dropout: share of the probabilities that are set to zero.

    Returns:
        In the shape and dtype of ``query``.
    """
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and fast_bfloat16(query.device):
        return product_attention(query, key, value, dropout)
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)


def product_attention(query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> Tensor:
    """:func:`attention` as product, softmax, product."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    return F.dropout(scores.softmax(-1), dropout) @ value
