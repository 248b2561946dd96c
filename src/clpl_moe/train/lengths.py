"""The longest query and passage of a run: as given, of the run to resume, or taken from the data.

From the data: passages get 128 to 512 tokens, such that 95% of a sample's are whole; queries get 32 to 128, such that all are.
Never more than the encoder has positions. With the 512, memory stays what the published recipe takes; BGE-M3 itself takes 8,192.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from clpl_moe.common.yaml_files import load_yaml
from clpl_moe.data.dataset import CLPLTrainDataset
from clpl_moe.data.lengths import Count, cut_off, fitting, percent, sample
from clpl_moe.encoder.settings import check_lengths, max_positions
from clpl_moe.train.arguments import CLPLDataArguments
from clpl_moe.train.resume import CONFIG_FILE

logger = logging.getLogger(__name__)

_LONGEST = 8_192  # that is counted, unless an encoder has more positions
MOST_CUT = 0.1  # share of texts; more is warned of


@dataclass(frozen=True)
class _Kind:
    option: str
    texts: str
    share: float  # that is whole
    least: int
    most: int


_KINDS = (
    _Kind("query_max_len", "queries", 1.0, 32, 128),
    _Kind("passage_max_len", "passages", 0.95, 128, 512),
)


@dataclass
class Lengths:
    """The lengths of a run; ``str`` is the line of the plan.

    Attributes:
        limits: option -> tokens.
        from_data: the options that were not given.
        cut: option -> texts of the sample that are longer, and all of them.
    """

    limits: dict[str, int]
    from_data: list[str]
    cut: dict[str, tuple[int, int]]

    def __str__(self) -> str:
        words = []
        for kind in _KINDS:
            chosen = "from the data, " if kind.option in self.from_data else ""
            words.append(f"{kind.texts} {self.limits[kind.option]} ({chosen}{percent(*self.cut[kind.option])} are cut)")
        return f"{', '.join(words)} tokens"

    def share(self, option: str) -> float:
        """The share of the sample's texts that are cut."""
        part, whole = self.cut[option]
        return part / max(1, whole)


def longest_counted(encoder: PreTrainedModel) -> int:
    """How many tokens of a text have to be counted, one more than an encoder can take."""
    return (max_positions(encoder) or _LONGEST) + 1


def choose_lengths(
    data_args: CLPLDataArguments,
    dataset: CLPLTrainDataset,
    encoder: PreTrainedModel,
    count: Count,
    *,
    name: str,
    checkpoint: str | None = None,
) -> Lengths:
    """Set the lengths in ``data_args`` that are not given, and warn where a tenth of the texts is cut.

    Every process finds the same ones. ``checkpoint`` is the one to resume from, whose run's lengths are taken; ``count`` counts
    tokens, to :func:`longest_counted` at least. Raises OptionError where the encoder, ``name`` in messages, has no such length.
    """
    found: dict[str, list[int]] = {kind.option: [] for kind in _KINDS}
    for example in sample(dataset):
        queries = [example.query, *(query for queries in example.negative_queries for query in queries)]
        for option, texts in zip(found, (queries, example.passages)):
            found[option] += count(texts)
    before = _of_the_run(checkpoint)
    limits, from_data, most = {}, [], max_positions(encoder) or _LONGEST
    for kind in _KINDS:
        given = getattr(data_args, kind.option) or before.get(kind.option)
        if given is None:
            from_data.append(kind.option)
            given = min(max(fitting(found[kind.option], kind.share), kind.least), kind.most, most)
        limits[kind.option] = given
        setattr(data_args, kind.option, given)
    check_lengths(encoder, data_args.query_max_len, data_args.passage_max_len, name)
    cut = {option: (cut_off(lengths, limits[option])[0], len(lengths)) for option, lengths in found.items()}
    lengths = Lengths(limits, from_data, cut)
    for kind in _KINDS:
        if lengths.share(kind.option) > MOST_CUT:
            _warn(kind, lengths, found[kind.option], most)
    return lengths


def _warn(kind: _Kind, lengths: Lengths, found: list[int], most: int) -> None:
    limit, share = lengths.limits[kind.option], percent(*lengths.cut[kind.option])
    tokens = percent(cut_off(found, limit)[1], int(np.sum(found)))
    better = min(fitting(found, 0.95), most)
    advice = f"set {kind.option} {better}"
    if better <= limit:
        advice = "the model takes no longer ones: split the texts"
    elif kind.option not in lengths.from_data and better <= kind.most:
        advice += ", or 0 to take it from the data"
    logger.warning(
        "%s %d cuts %s of the %s, which lose %s of their tokens: %s",
        *(kind.option, limit, share, kind.texts, tokens, advice),
    )


def _of_the_run(checkpoint: str | None) -> Mapping[str, int]:
    """The lengths of the run that a checkpoint belongs to, where they are still known."""
    path = None if checkpoint is None else Path(checkpoint).parent / CONFIG_FILE
    values = load_yaml(path) if path is not None and path.is_file() else {}
    return {kind.option: value for kind in _KINDS if isinstance(value := values.get(kind.option), int)}
