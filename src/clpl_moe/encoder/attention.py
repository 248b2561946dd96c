"""Attention of texts of one length on any device, the faster way."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from clpl_moe.encoder.precision import fast_bfloat16

_LOG2_E = math.log2(math.e)
_LONGEST = 1024  # tokens of a text whose scores are held: they take as much memory as all else of a layer


def attention(query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> Tensor:
    """Scaled dot product attention without a mask.

    In bfloat16 on a CPU that is fast at it, product, softmax and product take half the time of torch's own, forward and
    backward, and of short texts a quarter (``benchmarks/results/attention_avx512.json``); in inference mode
    :func:`power_attention` takes up to a third less than that. In float32, and on CPUs without such instructions, torch's own is
    faster. The products keep the probabilities for the backward pass, two bytes a head and pair of tokens. So texts of over 1,024
    tokens get torch's own, which holds none and is about as fast for them: at 8,192 tokens the scores of one text and layer of
    BGE-M3 would take 2 GB.

    Args:
        query: (n, heads, length or 1, d).
        key: (n, heads, length, d).
        value: (n, heads, length, d).
        dropout: share of the probabilities that are set to zero.

    Returns:
        In the shape and dtype of ``query``.
    """
    is_short = key.shape[-2] <= _LONGEST
    if query.device.type == "cpu" and query.dtype == torch.bfloat16 and is_short and fast_bfloat16(query.device):
        if torch.is_inference_mode_enabled() and dropout == 0:
            return power_attention(query, key, value)
        return product_attention(query, key, value, dropout)
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)


def product_attention(query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0) -> Tensor:
    """:func:`attention` as product, softmax, product."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    return F.dropout(scores.softmax(-1), dropout) @ value


def power_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """:func:`attention` without gradients: powers of the scores, product, and division by the sums of the powers.

    In :func:`product_attention` softmax takes up to half of the time. Most of that goes to finding each row's greatest score and
    subtracting it. This is left out here: in bfloat16 2**-100 to 2**100 are as precise as 0 to 1. Where a row's sum lies beyond,
    which is rare, the texts get :func:`product_attention`.
    """
    query_in_bits = query * (query.shape[-1] ** -0.5 * _LOG2_E)
    powers = (query_in_bits @ key.transpose(-2, -1)).exp2_()  # (n, heads, length or 1, length)
    sums = powers.sum(-1, keepdim=True)
    least, most = map(float, sums.aminmax())
    if not (least > 2**-100 and most < 2**100):  # NaN, too
        return product_attention(query, key, value)
    return (powers @ value).div_(sums)
