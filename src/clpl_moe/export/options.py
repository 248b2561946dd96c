"""Options of ``export``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clpl_moe.common.errors import OptionError
from clpl_moe.common.files import resolved
from clpl_moe.common.options import option


@dataclass
class ExportArguments:
    """What is exported, and where to."""

    input: str | None = option("model to export: a folder or hub name, with experts or dense", None)
    output: str | None = option("folder to write; must be new or empty, unless overwrite is set", None)
    revision: str | None = option("commit, branch or tag of input on the hub; not given: the newest", None)
    trim_vocab: list[str] = option(
        "files or folders of text (.jsonl, .txt, also .gz and .zst), such as a collection: only the pieces of the vocabulary"
        " that this text uses are kept, and what other text needs",
        [],
    )
    dtype: Literal["float32", "float16", "bfloat16"] | None = option(
        "precision of the weights that are written; not given: as they are in input", None
    )
    trust_remote_code: bool = option("run code that the model's own folder holds; look at it first", False)
    overwrite: bool = option("replace the exported model that is there", False)

    def __post_init__(self) -> None:
        for name in ("input", "output"):
            if not getattr(self, name):
                raise OptionError(name, "found nothing, expected a folder")
        if resolved(str(self.input)) == resolved(str(self.output)):
            raise OptionError("output", "found the folder of input, expected another one")
