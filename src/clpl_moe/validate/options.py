"""Options of ``validate``."""

from __future__ import annotations

from dataclasses import dataclass

from clpl_moe.common.errors import OptionError, UserError
from clpl_moe.common.options import check_bounds, option


@dataclass
class ValidateArguments:
    """Which files to look at, and how training will read them."""

    train_data: list[str] = option("files or folders of training data, or hub:NAME; not given: those of config", [])
    config: str | None = option(
        "YAML file of training: its data, limits, tokenizer, prompts and whether it needs scores", None
    )
    tokenizer: str | None = option("model folder or hub name whose tokens are counted; not given: that of config", None)
    revision: str | None = option("commit, branch or tag of tokenizer on the hub; not given: the newest", None)
    query_max_len: int | None = option(
        "longest query in tokens; not given: that of config", None, least=3, most=1_000_000
    )
    passage_max_len: int | None = option(
        "longest passage in tokens; not given: that of config", None, least=3, most=1_000_000
    )
    knowledge_distillation: bool = option("expect pos_scores and neg_scores in every line, also without config", False)
    max_faults: int = option("faults shown of each file; the rest is counted", 50, least=0)

    def __post_init__(self) -> None:
        if not self.train_data and self.config is None:
            raise UserError(
                "no file to validate: name at least one file or folder of training JSONL, or a config of training"
            )
        if self.revision is not None and self.tokenizer is None:
            raise OptionError("revision", "is for tokenizer; of the config's model, the config names it")
        check_bounds(self)
