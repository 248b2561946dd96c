"""Options of ``validate``."""

from __future__ import annotations

from dataclasses import dataclass, field

from clpl_moe.common.errors import UserError, require_at_least


@dataclass
class ValidateArguments:
    """Which files to look at, and how training will read them."""

    train_data: list[str] = field(
        default_factory=list, metadata={"help": "files or folders of training JSONL; not given: those of config"}
    )
    config: str | None = field(
        default=None,
        metadata={"help": "YAML file of training: its data, limits, tokenizer, prompts and whether it needs scores"},
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "model folder or hub name whose tokens are counted; not given: that of config"},
    )
    query_max_len: int | None = field(
        default=None, metadata={"help": "longest query in tokens; not given: that of config"}
    )
    passage_max_len: int | None = field(
        default=None, metadata={"help": "longest passage in tokens; not given: that of config"}
    )
    knowledge_distillation: bool = field(
        default=False, metadata={"help": "expect pos_scores and neg_scores in every line, also without config"}
    )
    max_faults: int = field(default=50, metadata={"help": "faults shown of each file; the rest is counted"})

    def __post_init__(self) -> None:
        if not self.train_data and self.config is None:
            raise UserError(
                "no file to validate: name at least one file or folder of training JSONL, or a config of training"
            )
        require_at_least(self, max_faults=0, query_max_len=3, passage_max_len=3)
