"""The options of ``clpl_moe.report`` and ``clpl_moe.card``."""

from __future__ import annotations

from dataclasses import dataclass, field

from clpl_moe.common.errors import OptionError, require_at_least


@dataclass
class ReportArguments:
    """What to report on, and where to."""

    output: str = field(metadata={"help": "folder for the page and its pictures"})
    runs: list[str] = field(
        default_factory=list, metadata={"help": "run folders of clpl_moe.train or of clpl_moe.ablate"}
    )
    before: list[str] | None = field(
        default=None,
        metadata={
            "help": "folder of the base model's results (of clpl_moe.evaluate: holds a folder per language), or its run folder"
            " of clpl_moe.ablate; one for all runs, or one for each"
        },
    )
    after: list[str] | None = field(
        default=None,
        metadata={"help": "folders of the runs' results, one for each; runs of clpl_moe.ablate bring their own"},
    )
    collection: str | None = field(
        default=None, metadata={"help": "folder of the collections; not given: the one that the results name"}
    )
    languages: list[str] | None = field(
        default=None, metadata={"help": "languages to compare; not given: all that both results have"}
    )
    metric: str = field(default="nDCG@5", metadata={"help": "what queries are compared by"})
    examples: int = field(default=5, metadata={"help": "queries shown of those that gained and lost most"})
    passages: int = field(default=3, metadata={"help": "passages shown of each, before and after"})
    title: str | None = field(default=None, metadata={"help": "title of the page"})
    overwrite: bool = field(default=False, metadata={"help": "replace the report that is there"})

    def __post_init__(self) -> None:
        if not self.runs:
            raise OptionError("runs", "no run to report on, expected at least one run folder")
        require_at_least(self, examples=1, passages=1)
        if self.after is not None and len(self.after) != len(self.runs):
            raise OptionError("after", f"found {len(self.after)}, expected one for each of the {len(self.runs)} runs")
        if self.before is not None and len(self.before) not in (1, len(self.runs)):
            raise OptionError("before", f"found {len(self.before)}, expected one, or one for each of the runs")
        if self.after is not None and self.before is None:
            raise OptionError("after", "its results are compared with the base model's, expected before, too")


@dataclass
class CardArguments:
    """Whose card, and which results."""

    run: str = field(metadata={"help": "run folder of clpl_moe.train"})
    after: str = field(metadata={"help": "folder of its results, which holds a folder per language"})
    before: str | None = field(default=None, metadata={"help": "folder of the base model's results"})
