"""The training set: triplets, with the queries that each negative answers."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import datasets
import pyarrow.compute as pc
from tqdm.auto import tqdm

from clpl_moe import __version__
from clpl_moe.common.compressed import plain_name
from clpl_moe.common.errors import UserError, at
from clpl_moe.common.files import refuse_unwritable
from clpl_moe.data.flag_embedding import AbsEmbedderTrainDataset
from clpl_moe.data.formats import DataFile, data_files, entry_path
from clpl_moe.data.schema import read_examples

_ROWS_AT_ONCE = 10_000
# Epoch and number of an example. Its random choices depend on these and the seed only, so that resumed runs choose alike.
Draw = tuple[int, int]

_TEXT, _SCORES = datasets.Value("string"), datasets.List(datasets.Value("float64"))
_TEXTS = datasets.List(_TEXT)
_FEATURES = datasets.Features(
    {
        **{"query": _TEXT, "pos": _TEXTS, "neg": _TEXTS, "negative_queries": datasets.List(_TEXTS)},
        **{"pos_scores": _SCORES, "neg_scores": _SCORES, "prompt": _TEXT, "type": _TEXT},
    }
)


@dataclass
class Example:
    """One query with its group, prompts applied."""

    query: str
    passages: list[str]  # the positive, then `train_group_size - 1` negatives
    negative_queries: list[list[str]]  # for each of these negatives the queries that it answers, possibly none
    teacher_scores: list[float] | None  # one for each passage
    in_batch_negatives: bool  # False where the file asks for its own negatives only
    expert: int | None = None  # that all its texts go to, with router given


class Negatives(Protocol):
    """Negatives in place of the files'."""

    def get(self, example: int) -> tuple[list[str], list[list[str]]] | None:
        """An example's negatives, and for each of them the queries that it answers; None: the file's negatives stay."""


class CLPLTrainDataset(AbsEmbedderTrainDataset):
    """Examples of all files of ``train_data``, checked line by line as they are read.

    Indexed by :data:`Draw`: seed, epoch and number decide the positive, negatives and negative queries. Once ``mined`` is
    set, negatives come from it.

    As in FlagEmbedding, a file or folder whose name ends in ``no_in_batch_neg`` has no in-batch negatives. With
    ``same_dataset_within_batch``, a folder's files with fewer than ``small_threshold`` examples are joined, and left out
    if they have fewer than ``drop_threshold`` together; a small file outside a folder is left out.

    Where no example has negatives, groups hold the positive alone. A pair among examples that have some gets positives of
    other examples for its negatives.

    Raises:
        UserError: a file is missing, empty or has a faulty line.
    """

    def __init__(self, args, seed: int = 42) -> None:
        self.args = args
        self.seed = seed
        self.shuffle_ratio = args.shuffle_ratio
        parts: list[datasets.Dataset] = []
        self.in_batch_negatives: list[bool] = []
        self._experts: list[int | None] = []
        experts = getattr(args, "experts_of_data", None) or [None] * len(args.train_data)
        for path, expert in zip(args.train_data, experts, strict=True):
            parts += self._load_path(path)
            own_only = Path(plain_name(entry_path(path))).stem.endswith("no_in_batch_neg")
            new = len(parts) - len(self.in_batch_negatives)
            self.in_batch_negatives += [not own_only] * new
            self._experts += [expert] * new
        self.part_sizes = [len(part) for part in parts]
        if not parts:
            limits = f"small_threshold is {args.small_threshold} and drop_threshold {args.drop_threshold}"
            raise UserError(f"{limits}: no file of train_data has so many examples")
        self.dataset = datasets.concatenate_datasets(parts)
        self.mined: Negatives | None = None
        self.pairs = [_count_pairs(part) for part in parts]  # examples without negatives, in each part
        self._starts = list(accumulate(self.part_sizes, initial=0))
        self._part_of = [part for part, size in enumerate(self.part_sizes) for _ in range(size)]

    def _load_path(self, path: str) -> list[datasets.Dataset]:
        parts = [self._load_dataset(file) for file in data_files([path])]
        if not self.args.same_dataset_within_batch:
            return parts
        small = [part for part in parts if len(part) < self.args.small_threshold]
        parts = [part for part in parts if len(part) >= self.args.small_threshold]
        if small and entry_path(path).is_dir():
            joined = datasets.concatenate_datasets(small)
            if len(joined) >= self.args.drop_threshold:
                parts.append(joined)
        return parts

    def _load_dataset(self, file: DataFile) -> datasets.Dataset:
        """Read, check and store one file; later runs take the stored examples as long as the file is unchanged."""
        digest = file.digest()
        arguments = {"file": file.resolved(), "version": f"{__version__}-{digest}"}
        arguments |= {"with_scores": self.args.knowledge_distillation}
        cache = self.args.cache_path or datasets.config.HF_DATASETS_CACHE
        try:
            refuse_unwritable(Path(cache, "examples"))
            with _no_bars_of_datasets():
                dataset = datasets.Dataset.from_generator(
                    _read_for_arrow, features=_FEATURES, cache_dir=self.args.cache_path, gen_kwargs=arguments
                )
        except datasets.exceptions.DatasetGenerationError as error:
            if isinstance(error.__cause__, UserError):
                raise error.__cause__ from None
            if isinstance(error.__cause__, OSError):
                raise _not_stored(cache, error.__cause__) from None
            raise
        except OSError as error:
            raise _not_stored(cache, error) from None
        limit = self.args.max_example_num_per_dataset
        if len(dataset) > limit:
            chosen = random.Random(f"{self.seed}-{digest}").sample(range(len(dataset)), limit)
            dataset = dataset.select(sorted(chosen))
        return dataset

    def group_size(self, part: int) -> int:
        """Passages per query of an example of one part, the same for all examples that may meet in a batch."""
        separate = self.args.same_dataset_within_batch
        pairs, examples = (self.pairs[part], self.part_sizes[part]) if separate else (sum(self.pairs), len(self))
        if pairs == examples and self.mined is None:
            return 1
        size = self.args.train_group_size
        if not separate:
            return size
        first = self.dataset[self._starts[part]]  # FlagEmbedding's `type` can lower it
        lowered = {"only_1neg": 2, "symmetric_class": min(len(first["neg"]) + 1, size)}
        return lowered.get(first["type"], size)

    def __getitem__(self, draw: Draw) -> Example:
        epoch, index = draw
        record, part = self.dataset[index], self._part_of[index]
        rng = random.Random(f"{self.seed}-{epoch}-{index}")
        positive = rng.randrange(len(record["pos"]))
        wanted = self.group_size(part) - 1
        negatives, negative_queries = record["neg"], record["negative_queries"]
        if self.mined is not None and (mined := self.mined.get(index)) is not None:
            negatives, negative_queries = mined
        if not negatives and wanted:
            negatives = self._positives_of_others(rng, record, part, wanted)
            negative_queries = [[] for _ in negatives]
        drawn = _sample(rng, len(negatives), wanted)
        texts = [self._shuffle_words(rng, record["pos"][positive]), *(negatives[i] for i in drawn)]
        limit = self.args.queries_per_negative
        negative_queries = [[q for q in negative_queries[i] if q != record["query"]] for i in drawn]
        negative_queries = [qs if len(qs) <= limit else rng.sample(qs, limit) for qs in negative_queries]
        scores = None
        if self.args.knowledge_distillation:
            scores = [record["pos_scores"][positive], *(record["neg_scores"][i] for i in drawn)]

        def prompted(query: str) -> str:
            if not (prompt := self.args.query_instruction_for_retrieval):
                return query
            prompt = prompt if record["prompt"] is None else record["prompt"]
            return self.args.query_instruction_format.format(prompt, query)

        symmetric = record["type"] in ("symmetric_sts", "symmetric_clustering")
        return Example(
            query=prompted(record["query"]),
            passages=[prompted(text) if symmetric else self._prompted_passage(text) for text in texts],
            negative_queries=[list(map(prompted, queries)) for queries in negative_queries],
            teacher_scores=scores,
            in_batch_negatives=self.in_batch_negatives[part],
            expert=self._experts[part],
        )

    def _positives_of_others(self, rng: random.Random, record: dict, part: int, wanted: int) -> list[str]:
        """``wanted`` positives of other queries of a part for one that has no negatives; its own, which is no negative of
        its, where there are none."""
        found: list[str] = []
        size = self.part_sizes[part]
        for number in rng.sample(range(size), min(size, 4 * wanted + 4)):
            other = self.dataset[self._starts[part] + number]
            text = rng.choice(other["pos"])
            if other["query"] != record["query"] and text not in record["pos"] and text not in found:
                found.append(text)
            if len(found) == wanted:
                break
        return found or record["pos"][:1]

    def _prompted_passage(self, text: str) -> str:
        prompt = self.args.passage_instruction_for_retrieval
        return self.args.passage_instruction_format.format(prompt, text) if prompt else text

    def _shuffle_words(self, rng: random.Random, text: str) -> str:
        """With probability ``shuffle_ratio``, a long text in thirds in another order."""
        if len(text) <= 100 or not rng.random() < self.shuffle_ratio:
            return text
        third = len(text) // 3 + 1
        parts = [text[start : start + third] for start in range(0, len(text), third)]
        rng.shuffle(parts)
        return " ".join(parts)


def _sample(rng: random.Random, available: int, wanted: int) -> list[int]:
    """``wanted`` of ``available`` places; none comes a second time before every one has come once."""
    chosen: list[int] = []
    while len(chosen) < wanted:
        chosen += rng.sample(range(available), min(available, wanted - len(chosen)))
    return chosen


def _count_pairs(part: datasets.Dataset) -> int:
    batches = part.select_columns("neg").with_format("arrow").iter(_ROWS_AT_ONCE)
    return sum(len(b) - pc.sum(pc.greater(pc.list_value_length(b["neg"]), 0)).as_py() for b in batches)


def _read_for_arrow(file: DataFile, version: str, with_scores: bool):
    del version  # part of the store's name only: a changed file, or any after an update of this package, is read again
    examples = read_examples(file, with_scores=with_scores)
    yield from tqdm(examples, desc=f"read {Path(file.name).name}", unit="line", delay=2, leave=False)


def _not_stored(cache: str | Path, error: OSError) -> UserError:
    return UserError(f"{at(cache)}: the examples cannot be stored ({error.strerror or error}); name another cache_path")


@contextlib.contextmanager
def _no_bars_of_datasets() -> Iterator[None]:
    # _read_for_arrow has a bar of its own for large files.
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
