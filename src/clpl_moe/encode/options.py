"""The options of ``clpl_moe.encode``; those of encoding stand in :mod:`clpl_moe.retrieval.options`."""

from __future__ import annotations

from dataclasses import dataclass

from clpl_moe.common.options import option


@dataclass
class EncodeArguments:
    """Which model encodes which corpora."""

    model: str = option("model folder or hub name")
    collection: str = option("folder that holds a collection per language")
    languages: list[str] = option("languages: the folders in it")
    revision: str | None = option("commit, branch or tag of a model on the hub; not given: the newest", None)
