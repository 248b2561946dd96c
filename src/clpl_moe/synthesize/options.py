"""Options of ``synthesize``; those of asking stand in :mod:`clpl_moe.llm.options`, those of encoding in
:mod:`clpl_moe.retrieval.options`."""

from __future__ import annotations

from dataclasses import dataclass

from clpl_moe.common.options import check_needs, option
from clpl_moe.llm.options import AskingArguments


@dataclass
class SynthesizeArguments(AskingArguments):
    """Which passages get queries, who writes them, and what is kept."""

    queries_per_passage: int = option("queries for each passage", 1, least=1, most=1_000)
    known_queries: bool = option(
        "do not ask about a passage that has queries elsewhere in the files, but use these", True
    )
    max_query_chars: int = option("a query of more characters is not used", 200, least=2, most=1_000_000)
    round_trip_model: str | None = option(
        "encoder that has to find the passage by its query; not given: no such check", None
    )
    round_trip_revision: str | None = option("as revision, of that encoder", None)
    round_trip_top: int = option("ranks in which it has to be found", 20, least=1, most=100_000_000)
    round_trip_collection: str | None = option(
        "collection whose passages are searched, too; not given: only those of train_data", None
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        names = ("round_trip_revision", "round_trip_top", "round_trip_collection")
        check_needs(self, dict.fromkeys(names, "round_trip_model"))
