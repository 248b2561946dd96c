"""The options of ``clpl_moe.merge``; those of encoding stand in :mod:`clpl_moe.retrieval.options`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clpl_moe.common.errors import OptionError
from clpl_moe.common.files import resolved
from clpl_moe.common.options import check_bounds, check_needs, check_outputs, option, refuse_revision_of_folder

RECORD_FILE = "merge.json"  # of a merged model's folder: what it was made from, and how good each candidate was
_SPREAD = [0.25, 0.5, 0.75, 1.0]


@dataclass
class MergeArguments:
    """What to merge, and how."""

    input: str | None = option("model to merge: a folder or hub name, with experts or dense", None)
    output: str | None = option("folder for the dense model; must be new or empty, unless overwrite is set", None)
    base: str | None = option(
        "model whose weights are mixed with it: its base model, a folder or hub name", None, aliases=["--with"]
    )
    revision: str | None = option("commit, branch or tag of input on the hub; not given: the newest", None)
    base_revision: str | None = option("as revision, of the base model", None)
    alpha: list[float] | None = option(
        "share of the tuned weights, 1 - alpha being the base's. Of several, and the base itself, the best on the"
        " collection is kept; not given: 0.25 0.5 0.75 1 with a collection, 0.5 without",
        None,
        least=0,
        most=1,
    )
    weights: Literal["mean", "load"] = option(
        "how experts are merged: mean, or load: each weighted by its layer's share of tokens in passages of the"
        " collection",
        "mean",
    )
    collection: str | None = option("folder of collections, to evaluate before and after", None)
    languages: list[str] | None = option("languages: the folders in it", None)
    split: str = option("which queries and judgements", "dev")
    metric: str = option("what is evaluated and decides, as a mean over languages", "nDCG@10")
    overwrite: bool = option("replace the model that is there", False)

    def __post_init__(self) -> None:
        check_bounds(self)
        if not self.input:
            raise OptionError("input", "found nothing, expected a folder")
        check_outputs(self, "output")
        for name in ("input", "base"):
            if (source := getattr(self, name)) is not None and resolved(source) == resolved(str(self.output)):
                raise OptionError("output", f"found the folder of {name}, expected another one")
        if self.alpha is not None and self.base is None:
            raise OptionError("alpha", "mixes with the weights of a base model, expected base, too")
        if self.base_revision is not None and self.base is None:
            raise OptionError("base_revision", "found no base, whose revision it is")
        refuse_revision_of_folder(str(self.base), self.base_revision, "base_revision")
        if len(self.alphas) > 1 and self.collection is None:
            raise OptionError("alpha", "found several, expected one, or a collection that decides between them")
        if (self.collection is None) != (self.languages is None):
            raise OptionError("languages", "expected with collection, and only with it")
        if self.weights == "load" and self.collection is None:
            raise OptionError("weights", "load is measured on texts, expected a collection")
        check_needs(self, dict.fromkeys(("split", "metric"), "collection"))

    @property
    def alphas(self) -> list[float]:
        """The shares of the tuned weights to try, in order; with several, 0 is among them."""
        if self.base is None:
            return [1.0]
        found = self.alpha or (_SPREAD if self.collection is not None else [0.5])
        return sorted({0.0, *found}) if len(found) > 1 else list(found)
