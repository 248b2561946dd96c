"""Options of ``mine``; those of encoding stand in :mod:`clpl_moe.retrieval.options`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from clpl_moe.common.errors import OptionError
from clpl_moe.common.options import check_bounds, check_needs, given, option

Sampling = Literal["top", "random", "score", "corpus"]
PositiveScore = Literal["lowest", "mean", "highest"]
_NEEDS = {
    **dict.fromkeys(("reranker_revision", "reranker_max_len", "reranker_batch_size"), "reranker"),
    **dict.fromkeys(("guide_revision", "guide_margin", "guide_query_prompt", "guide_passage_prompt"), "guide"),
}


@dataclass
class MineArguments:
    """What to mine from, and what to write."""

    model: str = option("model folder or hub name; normally the model that is to be trained")
    collection: str = option("folder that holds a collection per language")
    language: str = option("language: the folder in it")
    output: str = option("JSONL file to write")
    revision: str | None = option("commit, branch or tag of a model on the hub; not given: the newest", None)
    split: str = option("which queries and judgements", "train")
    max_positive_queries: int = option(
        "known queries written for a negative at most, drawn from more", 4, least=0, most=1_000_000
    )
    reranker: str | None = option(
        "cross encoder (folder or hub name) that scores passages up to rank_to anew; all limits go by its scores", None
    )
    reranker_revision: str | None = option("as revision, of the reranker", None)
    reranker_max_len: int = option("longest pair in tokens; the rest is cut off", 512, least=8, most=1_000_000)
    reranker_batch_size: int = option("pairs that the reranker takes at once", 32, least=1, most=65_536)
    guide: str | None = option(
        "another encoder (folder or hub name): what it finds more similar to the query than the positive is no negative",
        None,
    )
    guide_revision: str | None = option("as revision, of the guide", None)
    guide_margin: float = option(
        "how far below the positive's score by the guide a negative's must be; -2 leaves out nothing, and writes the scores",
        0.0,
        least=-2,
        most=2,
    )
    guide_query_prompt: str | None = option("as query_prompt, of the guide", None)
    guide_passage_prompt: str | None = option("as passage_prompt, of the guide", None)
    seed: int = option("decides every draw", 42)
    overwrite: bool = option("replace the output file", False)

    def __post_init__(self) -> None:
        check_bounds(self)
        check_needs(self, _NEEDS)


@dataclass
class SelectionArguments:
    """Which passages become negatives."""

    # Chosen with benchmarks/false_negatives.py. The limit of 95% halves the false negatives of a multilingual E5 on Korean; to
    # rank 200 it leaves a third as many questions without any negative as to rank 60.
    rank_from: int = option(
        "first rank of the window; rank 1 is too often right but not judged", 2, least=1, most=100_000_000
    )
    rank_to: int = option("last rank of the window; known positives have no rank", 200, least=1, most=100_000_000)
    negatives: int = option("negatives for each query; training draws some each time", 8, least=1, most=1_000_000)
    sampling: Sampling = option(
        "the window's first passages; any of it, all equally likely; any, similar ones more likely; or any passage"
        " of the whole corpus, without ranking and scores",
        "top",
    )
    sampling_temperature: float = option("of sampling score: a passage's weight is exp(score / temperature)", 0.02)
    max_positive_ratio: float = option(
        "highest score of a negative, as a share of the positive's; 0: no such limit", 0.95
    )
    margin: float | None = option(
        "how far below the positive's score a negative's must be; not given: no such limit", None
    )
    positive_score: PositiveScore = option(
        "of a query with several positives: the score that these limits go by", "lowest"
    )
    max_overlap: float = option(
        "share of the shorter text that a negative and a positive may have in common, in pieces of 5 characters;"
        " 1: no such limit",
        0.8,
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        if not 1 <= self.rank_from <= self.rank_to:
            found = f"found {self.rank_from} with rank_to {self.rank_to}"
            raise OptionError("rank_from", f"{found}, expected 1 <= rank_from <= rank_to")
        width = self.rank_to - self.rank_from + 1
        if self.negatives < 1 or (self.negatives > width and self.sampling != "corpus"):
            window = f"the window from rank {self.rank_from} to {self.rank_to} holds {width}"
            raise OptionError("negatives", f"found {self.negatives}, {window}")
        if not 0 <= self.max_positive_ratio < math.inf:
            raise OptionError("max_positive_ratio", f"found {self.max_positive_ratio}, expected 0 (no limit) or more")
        if self.margin is not None and not math.isfinite(self.margin):
            raise OptionError("margin", f"found {self.margin}, expected a number")
        if not 0 < self.max_overlap <= 1:
            raise OptionError("max_overlap", f"found {self.max_overlap}, expected a share above 0, 1 for no limit")
        if not 0 < self.sampling_temperature < math.inf:
            raise OptionError("sampling_temperature", f"found {self.sampling_temperature}, expected a number above 0")
        check_needs(self, {"sampling_temperature": "sampling score"})
        if self.sampling == "corpus":
            for name in ("margin", "positive_score", "max_positive_ratio"):
                if name in given(self) and getattr(self, name):  # 0 is no limit
                    raise OptionError(name, "goes with a sampling that ranks passages, not with corpus")
