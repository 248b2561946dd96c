"""The options of ``clpl_moe.check``."""

from __future__ import annotations

from dataclasses import dataclass

from clpl_moe.check.calls import find_tools
from clpl_moe.common.errors import OptionError
from clpl_moe.common.options import option


@dataclass
class CheckArguments:
    """Which model, in which tools."""

    folder: str | None = option("model folder", None)
    tools: list[str] | None = option("only these tools; not given: all that are installed", None)
    trust_remote_code: bool = option("run code that the model's own folder holds; look at it first", False)

    def __post_init__(self) -> None:
        if not self.folder:
            raise OptionError("folder", "found nothing, expected a model folder")
        find_tools(self.tools)
