"""Options of ``mine``: what to mine from, and which passages become negatives."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from clpl_moe.common.errors import OptionError, require_at_least

Sampling = Literal["top", "random", "score", "corpus"]


@dataclass
class MineArguments:
    """What to mine from, and what to write."""

    model: str = field(metadata={"help": "model folder or hub name; normally the model that is to be trained"})
    collection: str = field(metadata={"help": "folder that holds a collection per language"})
    language: str = field(metadata={"help": "language: the folder in it"})
    output: str = field(metadata={"help": "JSONL file to write"})
    split: str = field(default="train", metadata={"help": "which queries and judgements"})
    max_positive_queries: int = field(
        default=4,
        metadata={"help": "known queries written for a negative at most, drawn from more"},
    )
    reranker: str | None = field(
        default=None,
        metadata={
            "help": "cross encoder (folder or hub name) that scores passages up to rank_to anew; all limits go by its scores"
        },
    )
    reranker_max_len: int = field(default=512, metadata={"help": "longest pair in tokens; the rest is cut off"})
    reranker_batch_size: int = field(default=32, metadata={"help": "pairs that the reranker takes at once"})
    seed: int = field(default=42, metadata={"help": "decides every draw"})
    overwrite: bool = field(default=False, metadata={"help": "replace the output file"})

    def __post_init__(self) -> None:
        require_at_least(self, max_positive_queries=0, reranker_max_len=8, reranker_batch_size=1)


@dataclass
class SelectionArguments:
    """Which passages become negatives."""

    # Chosen with benchmarks/false_negatives.py. The limit of 95% halves the false negatives of a multilingual E5 on Korean; to
    # rank 200 it leaves a third as many questions without any negative as to rank 60.
    rank_from: int = field(
        default=2, metadata={"help": "first rank of the window; rank 1 is too often right but not judged"}
    )
    rank_to: int = field(default=200, metadata={"help": "last rank of the window; known positives have no rank"})
    negatives: int = field(default=8, metadata={"help": "negatives for each query; training draws some each time"})
    sampling: Sampling = field(
        default="top",
        metadata={
            "help": "the window's first passages; any of it, all equally likely; any, similar ones more likely; or any passage"
            " of the whole corpus, without ranking and scores"
        },
    )
    sampling_temperature: float = field(
        default=0.02, metadata={"help": "of sampling score: a passage's weight is exp(score / temperature)"}
    )
    max_positive_ratio: float = field(
        default=0.95,
        metadata={"help": "highest score of a negative, as a share of the lowest positive's; 0: no such limit"},
    )
    margin: float | None = field(
        default=None,
        metadata={"help": "how far below the lowest positive's score a negative's must be; not given: no such limit"},
    )
    max_overlap: float = field(
        default=0.8,
        metadata={
            "help": "share of the shorter text that a negative and a positive may have in common, in pieces of 5 characters;"
            " 1: no such limit"
        },
    )

    def __post_init__(self) -> None:
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
