"""Options of ``judge``; those of asking stand in :mod:`clpl_moe.llm.options`, those of encoding in
:mod:`clpl_moe.retrieval.options`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from clpl_moe.common.errors import OptionError
from clpl_moe.common.options import check_needs, given, option
from clpl_moe.llm.options import AskingArguments


@dataclass
class JudgeArguments(AskingArguments):
    """Which passages are judged, by whom, and what becomes of them."""

    local_temperature: ClassVar[float] = 0.0
    local_answer_tokens: ClassVar[int] = 1024

    temperature: float | None = option(
        "not given: the server's own; 0 with backend transformers", None, least=0, most=100
    )
    max_answer_tokens: int | None = option(
        "longest answer; not given: the server's own; 1024 with backend transformers", None, least=1, most=1_000_000
    )
    ask: Literal["doubtful", "all"] = option("judge doubtful negatives, by their scores, or all", "doubtful")
    margin: float = option(
        "a negative is doubtful whose score is at most this far below the lowest positive's of its line",
        0.1,
        least=0,
        most=1_000_000,
    )
    share: float | None = option(
        "in place of margin: this share of all negatives is doubtful, the ones with the highest scores; not given: by margin",
        None,
        least=0,
        most=1,
    )
    score_model: str | None = option("encoder that computes the scores; not given: those in the files", None)
    score_revision: str | None = option("as revision, of that encoder", None)
    positives: bool = option(
        "judge positives, too: with ask doubtful those that score at most margin above the line's highest negative, or the share"
        " with the lowest scores. What does not answer is dropped",
        False,
    )
    answering: Literal["positive", "drop"] = option(
        "a negative that answers its query becomes a positive, or is dropped", "positive"
    )
    passages_per_question: int = option("passages of a query that are shown at once", 8, least=1, most=1_000)
    write_queries: bool = option(
        "the model also writes a query for each passage that does not answer; it goes to neg_q where that has none",
        False,
    )
    max_query_chars: int = option("a written query of more characters is not used", 200, least=2, most=1_000_000)
    seed: int = option("decides the order in which passages are shown", 42)

    def __post_init__(self) -> None:
        super().__post_init__()
        needs = {"score_model": "ask doubtful", "score_revision": "score_model", "max_query_chars": "write_queries"}
        check_needs(self, {"margin": "ask doubtful", "share": "ask doubtful", **needs})
        if self.share is not None and "margin" in given(self):
            raise OptionError("share", "takes the place of margin; leave out one of the two")
