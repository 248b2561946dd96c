"""The options of ``clpl_moe.report`` and ``clpl_moe.card``."""

from __future__ import annotations

from dataclasses import dataclass

from clpl_moe.common.errors import OptionError
from clpl_moe.common.options import check_bounds, check_outputs, option


@dataclass
class ReportArguments:
    """What to report on, and where to."""

    output: str = option("folder for the page and its pictures")
    runs: list[str] = option("run folders of clpl_moe.train or of clpl_moe.ablate", [])
    before: list[str] | None = option(
        "folder of the base model's results (of clpl_moe.evaluate: holds a folder per language), or its run folder"
        " of clpl_moe.ablate; one for all runs, or one for each",
        None,
    )
    after: list[str] | None = option(
        "folders of the runs' results, one for each; runs of clpl_moe.ablate bring their own", None
    )
    collection: str | None = option("folder of the collections; not given: the one that the results name", None)
    languages: list[str] | None = option("languages to compare; not given: all that both results have", None)
    metric: str = option("what queries are compared by", "nDCG@5")
    examples: int = option("queries shown of those that gained and lost most", 5, least=1, most=10_000)
    passages: int = option("passages shown of each, before and after", 3, least=1, most=1_000)
    title: str | None = option("title of the page", None)
    overwrite: bool = option("replace the report that is there", False)

    def __post_init__(self) -> None:
        if not self.runs:
            raise OptionError("runs", "no run to report on, expected at least one run folder")
        check_bounds(self)
        if self.after is not None and len(self.after) != len(self.runs):
            raise OptionError("after", f"found {len(self.after)}, expected one for each of the {len(self.runs)} runs")
        if self.before is not None and len(self.before) not in (1, len(self.runs)):
            raise OptionError("before", f"found {len(self.before)}, expected one, or one for each of the runs")
        if self.after is not None and self.before is None:
            raise OptionError("after", "its results are compared with the base model's, expected before, too")


@dataclass
class CardArguments:
    """Whose card, and which results."""

    run: str = option("run folder of clpl_moe.train")
    after: str = option("folder of its results, which holds a folder per language")
    before: str | None = option("folder of the base model's results", None)

    def __post_init__(self) -> None:
        check_outputs(self, "run")
