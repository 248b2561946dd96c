"""The options of ``clpl_moe.evaluate``; those of encoding stand in :mod:`clpl_moe.retrieval.options`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clpl_moe.common.errors import OptionError
from clpl_moe.common.options import check_bounds, check_needs, option
from clpl_moe.evaluate.metrics import EVALUATION_METRICS, M3_WEIGHTS

_MAIN_METRIC = "nDCG@10"  # of MIRACL


@dataclass
class EvaluateArguments:
    """Which models to evaluate on which collections."""

    model: list[str] = option("model folders or hub names; several give one table")
    collection: str = option("folder that holds a collection per language")
    languages: list[str] = option("languages: the folders in it")
    output: str = option(
        "folder for results. A folder per language (of several models: per model and language) holds run.trec"
        " (retrieved passages), qrels.trec (judgements) and metrics.json (metrics, and hashes of model and data); with"
        " m3_scores also run.KIND.trec for each kind of score and metrics.m3.json. Beside them stand per_query.csv"
        " (language, query id, text and each model's metrics of each query) and, for several models,"
        " significance.json (each pair compared)"
    )
    revision: list[str] | None = option(
        "commit, branch or tag of the models on the hub: one for all of these, or one for each model; not given: the newest",
        None,
    )
    split: str = option("which queries and judgements", "dev")
    metrics: list[str] = option(
        "metrics, in the spelling of ir_measures; RR is the reciprocal rank (MRR), AP is MAP", list(EVALUATION_METRICS)
    )
    top_k: int = option("passages retrieved for each query", 1000, least=1, most=100_000_000)
    compare_metric: list[str] | None = option(
        "metrics by which each pair of models is compared: a two-sided paired randomisation test over the"
        " queries of each language, with Holm's correction for the number of pairs; not given: nDCG@10, or the"
        " first of metrics where that lacks it",
        None,
    )
    m3_scores: bool = option(
        "also rank the first passages of the dense run by the scores of BGE-M3's heads: sparse, multi-vec,"
        " dense+sparse and all (weighted means); a model without sparse_linear.pt and colbert_linear.pt gets dense results only",
        False,
    )
    rerank_top: int = option("with m3_scores: how many passages of the dense run", 200, least=1, most=1_000_000)
    m3_weights: list[float] = option(
        "with m3_scores: weights of the dense, sparse and multi-vec score in the sums", list(M3_WEIGHTS)
    )
    overwrite: bool = option("replace results of another model, data or settings", False)

    def __post_init__(self) -> None:
        check_bounds(self)
        weights = self.m3_weights
        # Scores times others would be infinite or 0 in 32 bits.
        fit = all(weight == 0 or 1e-6 <= weight <= 1e6 for weight in weights)
        if len(weights) != 3 or not fit or sum(weights[:2]) == 0:
            found = " ".join(map(str, weights))
            expected = "expected three, each 0 or from 1e-6 to 1e6, with dense or sparse above 0"
            raise OptionError("m3_weights", f"found {found}, {expected}")
        check_needs(self, dict.fromkeys(("rerank_top", "m3_weights"), "m3_scores"))
        if self.revision is not None and len(self.revision) not in (1, len(self.model)):
            expected = f"expected one, or one for each of the {len(self.model)} models"
            raise OptionError("revision", f"found {len(self.revision)}, {expected}")
        if self.revision is not None and not any(self.revisions.values()):
            raise OptionError("revision", "every model is a folder here, which has none; leave it out")
        for name, revision in zip(self.model, self.revision or ()):
            if self.revisions[name] not in (None, revision):  # results are kept by the model's name
                raise OptionError("revision", f"found two of {name}, expected one; give each an output of its own")
        for name in self.compared_metrics:
            if name not in self.metrics:
                expected = f"expected some of metrics: {', '.join(self.metrics)}"
                raise OptionError("compare_metric", f"found {name}, {expected}")

    @property
    def revisions(self) -> dict[str, str | None]:
        """The revision of each model; None for folders."""
        given: Sequence[str | None] = self.revision or (None,)
        each = list(given) * len(self.model) if len(given) == 1 else given
        return {name: None if Path(name).is_dir() else revision for name, revision in zip(self.model, each)}

    @property
    def compared_metrics(self) -> list[str]:
        """The metrics by which models are compared."""
        return self.compare_metric or [_MAIN_METRIC if _MAIN_METRIC in self.metrics else self.metrics[0]]
