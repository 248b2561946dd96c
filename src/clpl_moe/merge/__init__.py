"""Merging: experts to one dense layer, an adapter with its base model, and a tuned model with its base model.

The result is a dense encoder of a stock class, which every tool loads without remote code. ``merge.json`` in its folder says
what it was made from and, with a collection, how good each candidate was.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from clpl_moe.common.api import takes_options
from clpl_moe.common.errors import OptionError, UserError, at
from clpl_moe.common.files import refuse_existing, write_json
from clpl_moe.common.options import refuse_given
from clpl_moe.common.output import Output, writing
from clpl_moe.merge.options import RECORD_FILE, MergeArguments
from clpl_moe.retrieval.collection import Collection
from clpl_moe.retrieval.options import EncodingArguments, choose_or_refuse, open_encoder

if TYPE_CHECKING:
    from torch import Tensor

    from clpl_moe.encoder import Encoder

logger = logging.getLogger(__name__)

__all__ = ["MergeArguments", "Merged", "merge"]

# Of the output; first the record, which no other model folder has.
_FILES = (
    RECORD_FILE,
    "*.json",
    "*.safetensors",
    "*.model",
    "*.txt",
    "*.jinja",
    "*_linear.pt",
    "1_Pooling",
    "2_Normalize",
)
_PASSAGES = 1000  # of each language, for the load of the experts


@dataclass
class Merged:
    """A merged model; ``str`` is the text for people.

    Attributes:
        folder: the dense model's.
        alpha: share of the tuned weights in it; 1 without a base model, 0 if it is the base model.
        metric: what the model was evaluated by.
        before: language -> value of the model before; empty without a collection.
        candidates: share of the tuned weights -> language -> value; empty without a collection.
    """

    folder: Path
    alpha: float
    metric: str
    before: dict[str, float] = field(default_factory=dict)
    candidates: dict[float, dict[str, float]] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = {"before": self.before} if self.before else {}
        rows |= {"merged" if len(self.candidates) == 1 else f"alpha {a:g}": m for a, m in self.candidates.items()}
        lines = []
        if rows:
            lines.append(f"{self.metric:<12}" + "".join(f"{language:>10}" for language in [*self.before, "mean"]))
            for name, values in rows.items():
                cells = [*values.values(), _mean(values)]
                lines.append(f"{name:<12}" + "".join(f"{value:>10.4f}" for value in cells))
        chosen = len(self.candidates) > 1
        kept = f", of alpha {self.alpha:g}" if chosen or self.alpha != 1 else ""
        if chosen and self.alpha == 0:
            kept += ": no other candidate is better than the base model, which it is"
        return "\n".join([*lines, f"saved to {self.folder}: the dense model{kept}"])


@takes_options(MergeArguments, EncodingArguments)
def merge(arguments: MergeArguments, encoding: EncodingArguments) -> Merged:
    """Merge experts, an adapter, and a model with its base model; writes the dense model and returns what was found.

    Raises:
        UserError: nothing to merge, models that do not fit each other, a fault in a collection, an output in the way.
    """
    from clpl_moe.evaluate.metrics import check_metrics

    check_metrics([arguments.metric])
    if arguments.collection is None:
        refuse_given(encoding, "collection", but=("expert", "trust_remote_code"))
    output = Path(str(arguments.output))
    with writing(output) as place:
        refuse_existing(output, arguments.overwrite, files=_FILES)
        return _merge(arguments, encoding, place)


def _merge(arguments: MergeArguments, encoding: EncodingArguments, place: Output) -> Merged:
    from clpl_moe.encoder.adapter import find_adapter
    from clpl_moe.encoder.settings import check_lengths
    from clpl_moe.evaluate.evaluation import evaluate_retrieval
    from clpl_moe.merge.mix import Mixer, best_alpha
    from clpl_moe.moe.inject import has_experts, merge_experts

    source = str(arguments.input)
    collections = {
        language: Collection.load(str(arguments.collection), language, arguments.split)
        for language in dict.fromkeys(arguments.languages or [])
    }
    encoder = open_encoder(source, encoding, arguments.revision)
    with_experts = has_experts(encoder.model)
    adapted = find_adapter(source, revision=arguments.revision) is not None  # and is merged by now
    if not with_experts and ((arguments.base is None and not adapted) or arguments.weights == "load"):
        what = "nothing to merge; expected experts" + (", or base" if arguments.base is None else "")
        raise OptionError("input", f"found a dense model in {source}, {what}")
    if arguments.weights == "load" and encoding.expert is not None:
        raise OptionError("weights", "found load, and expert, which alone is kept; leave out one of the two")
    if collections:
        check_lengths(encoder.model, encoding.query_max_len, encoding.passage_max_len, source)
    base = (
        _open_base(arguments.base, arguments.base_revision, encoding, encoder) if arguments.base is not None else None
    )
    cache = place.embeddings if encoding.cache_dir is None else Path(encoding.cache_dir)

    def evaluate() -> dict[str, float]:
        found = {
            language: evaluate_retrieval(encoder, collection, encoding, metrics=[arguments.metric], cache=cache)
            for language, collection in collections.items()
        }
        return {language: result.metrics[arguments.metric] for language, result in found.items()}

    merged = Merged(Path(str(arguments.output)), arguments.alphas[-1], arguments.metric, before=evaluate())
    if with_experts:
        shares = _load_of(encoder, collections, encoding) if arguments.weights == "load" else None
        if encoding.expert is not None:
            shares = _one_expert(encoder, encoding.expert)
        merge_experts(encoder, shares)
    mixer = None if base is None else Mixer(encoder, base)
    for alpha in arguments.alphas if collections else []:
        if mixer is not None:
            mixer.mix(alpha)
        merged.candidates[alpha] = evaluate()
    if len(merged.candidates) > 1:
        merged.alpha = best_alpha({alpha: _mean(values) for alpha, values in merged.candidates.items()})
    if mixer is not None:
        mixer.mix(merged.alpha)
    with place.replacement() as folder:
        # With the settings of its folder: for the evaluation, options may have changed them.
        saved = type(encoder)(encoder.model, encoder.tokenizer, head_files=encoder.head_files)
        saved.save(folder, heads=None if mixer is None else mixer.heads(merged.alpha))
        write_json(folder / RECORD_FILE, dataclasses.asdict(arguments) | _as_json(merged))
    return merged


def _open_base(name: str, revision: str | None, encoding: EncodingArguments, tuned: Encoder) -> Encoder:
    from clpl_moe.moe.inject import has_experts, merge_experts

    expert = encoding.expert
    base = open_encoder(name, dataclasses.replace(encoding, expert=None), revision)
    if has_experts(base.model):
        if expert is not None:
            choose_or_refuse(base, expert, where=f"{name}: ")
        merge_experts(base, None if expert is None else _one_expert(base, expert))
    if base.settings != tuned.settings:
        logger.warning("%s has other pooling or prompts than the model merged with it, whose are taken", name)
    if base.tokenizer.get_vocab() != tuned.tokenizer.get_vocab():
        raise UserError(f"{at(name)}: base has another vocabulary than input; expected its base model")
    return base


def _load_of(encoder: Encoder, collections: Mapping[str, Collection], encoding: EncodingArguments) -> Tensor:
    """(L, N), measured on passages spread evenly over each collection."""
    from clpl_moe.moe.balance import measure_load
    from clpl_moe.retrieval.store import encode_passages

    texts = []
    for collection in collections.values():
        step = max(1, len(collection.passages) // _PASSAGES)
        texts += [collection.passages[place] for place in range(0, len(collection.passages), step)][:_PASSAGES]
    return measure_load(encoder.model, lambda: encode_passages(encoder, texts, encoding))


def _one_expert(encoder: Encoder, expert: int) -> Tensor:
    import torch

    from clpl_moe.moe.install import layer_states

    return torch.stack([torch.eye(len(router.weight))[expert] for _, _, router in layer_states(encoder.model)])


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)


def _as_json(merged: Merged) -> dict[str, object]:
    candidates = [{"alpha": alpha, "metrics": metrics} for alpha, metrics in merged.candidates.items()]
    return {"output": str(merged.folder), "alpha": merged.alpha, "before": merged.before, "candidates": candidates}
