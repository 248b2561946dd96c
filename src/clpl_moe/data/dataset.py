"""The training set: triplets, with the queries that each negative answers."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import pyarrow.compute as pc
from tqdm.auto import tqdm

from clpl_moe import __version__
from clpl_moe.common.compressed import plain_name
from clpl_moe.common.errors import OptionError, UserError, at
from clpl_moe.common.files import refuse_unwritable
from clpl_moe.common.text_key import text_id
from clpl_moe.data.answers import KnownAnswers, Pairs, all_answer_all, count_negatives, known_pairs
from clpl_moe.data.flag_embedding import AbsEmbedderTrainDataset
from clpl_moe.data.formats import DataFile, data_files, entry_path
from clpl_moe.data.guide import count_rejected, rejected
from clpl_moe.data.schema import read_examples

_ROWS_AT_ONCE = 10_000
# Epoch and number of an example. Its random choices depend on these and the seed only, so that resumed runs choose alike.
Draw = tuple[int, int]

_TEXT, _SCORES = datasets.Value("string"), datasets.List(datasets.Value("float64"))
_TEXTS, _ID = datasets.List(_TEXT), datasets.Value("int64")
_IDS = datasets.List(_ID)
_FEATURES = datasets.Features(
    {
        **{"query": _TEXT, "pos": _TEXTS, "neg": _TEXTS, "negative_queries": datasets.List(_TEXTS)},
        **{"pos_scores": _SCORES, "neg_scores": _SCORES, "prompt": _TEXT, "type": _TEXT},
        **{"pos_guide_scores": _SCORES, "neg_guide_scores": _SCORES},
        **{"query_id": _ID, "pos_ids": _IDS, "neg_ids": _IDS, "negative_query_ids": datasets.List(_IDS)},
    }
)
_STORE = "guide"  # part of the name of stored examples; another one where their fields change


@dataclass
class Negative:
    """A passage that does not answer the query, without prompt, and the queries that it does answer."""

    text: str
    id: int
    queries: list[str]
    query_ids: list[int]
    score: float = -math.inf  # a teacher's; as it is, of a passage that no teacher has scored


@dataclass
class TextIds:
    """Ids of an example's texts, without prompts (:func:`clpl_moe.common.text_key.text_id`)."""

    query: int
    passages: list[int]  # -1 where one only fills up the group
    negative_queries: list[list[int]]
    answers: list[set[int]]  # what is known to answer the query, then each of the negative queries


@dataclass
class Example:
    """One query with its group, prompts applied."""

    query: str
    passages: list[str]  # the positive, then `train_group_size - 1` negatives
    negative_queries: list[list[str]]  # for each of these negatives the queries that it answers, possibly none
    teacher_scores: list[float] | None  # one for each passage
    in_batch_negatives: bool  # False where the file asks for its own negatives only
    expert: int | None = None  # that all its texts go to, with router given
    ids: TextIds | None = None  # None: of the texts as they stand here

    def text_ids(self) -> TextIds:
        """The ids of the example's texts."""
        if self.ids is not None:
            return self.ids
        queries = [list(map(text_id, queries)) for queries in self.negative_queries]
        unknown: list[set[int]] = [set() for _ in range(1 + sum(map(len, queries)))]
        return TextIds(text_id(self.query), list(map(text_id, self.passages)), queries, unknown)


class Negatives(Protocol):
    """Negatives in place of the files'."""

    def get(self, example: int) -> list[Negative] | None:
        """An example's negatives; None: the file's negatives stay."""

    def answers(self, query: int) -> Iterable[int]:
        """Ids of the passages that are known to answer a query, of which the files may know nothing."""


class CLPLTrainDataset(AbsEmbedderTrainDataset):
    """Examples of all files of ``train_data``, checked line by line as they are read.

    Indexed by :data:`Draw`: seed, epoch and number decide the positive, negatives and negative queries. Once ``mined`` is
    set, negatives come from it.

    What is known to answer a query, by any line of any file, is none of its negatives, nor is the query's own text; and a
    negative comes once. A group that has too few is filled up with a text that counts nothing (id -1). With
    ``leave_out_answers`` False negatives are as the files say, and few ones are repeated. With ``guide_margin``, what the
    line's guide scores above the example's positive, less this margin, is none of its negatives, either.

    As in FlagEmbedding, a file or folder whose name ends in ``no_in_batch_neg`` has no in-batch negatives. With
    ``same_dataset_within_batch``, a folder's files with fewer than ``small_threshold`` examples are joined, and left out
    if they have fewer than ``drop_threshold`` together; a small file outside a folder is left out.

    Where no example has negatives, groups hold the positive alone. A pair among examples that have some gets positives of
    other examples for its negatives.

    Attributes:
        left_out: number of the files' negatives that are left out.
        left_out_by_guide: number of the files' negatives that the guide leaves out, whichever positive is drawn.
        small_groups: number of examples, pairs aside, with too few negatives for their group.
        own_negatives: for each part, whether any example has a negative that is not left out.
        without_contrast: for each set of examples that may meet in a batch (each part, or all together), how many queries and
            positives it has, if each positive answers each query; None otherwise.

    Raises:
        UserError: a file is missing, empty or has a faulty line.
    """

    def __init__(
        self, args, seed: int = 42, *, leave_out_answers: bool = True, guide_margin: float | None = None
    ) -> None:
        self.args = args
        self.guide_margin = guide_margin
        self.leave_out_answers = leave_out_answers
        pairs: list[Pairs] = []
        self._known_pairs = pairs if leave_out_answers else None
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
        self.pairs = [_count(part, "neg", _are_empty) for part in parts]  # examples without negatives, in each part
        self.prompts = sum(_count(part, "prompt", _are_texts) for part in parts)  # examples with a prompt of their own
        self._starts = list(accumulate(self.part_sizes, initial=0))
        self._part_of = [part for part, size in enumerate(self.part_sizes) for _ in range(size)]
        self.left_out = self.small_groups = self.left_out_by_guide = 0
        self._known: KnownAnswers | None = None
        self.own_negatives = [pairs < size for pairs, size in zip(self.pairs, self.part_sizes)]
        if leave_out_answers:
            self._known_pairs = None
            self._known = KnownAnswers(pairs)
            counts, pairs_only, self.left_out = count_negatives(self.dataset, self._known)
            wanted = np.repeat([self.group_size(part) - 1 for part in range(len(parts))], self.part_sizes)
            self.small_groups = int(((counts < wanted) & ~pairs_only).sum())
            self.own_negatives = [bool(counts[start:end].any()) for start, end in pairwise(self._starts)]
        together = parts if args.same_dataset_within_batch else [self.dataset]
        self.without_contrast = [all_answer_all(examples, self._known) for examples in together]
        if self._known is not None:
            self._known.forget_single()
        if guide_margin is not None:
            scored, self.left_out_by_guide = count_rejected(self.dataset, guide_margin)
            if not scored:
                fault = "no line of train_data has scores of a guide (neg_guide_scores, or neg_scores)"
                raise OptionError("guide_margin", f"{fault}; mine --guide writes them")

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
        arguments = {"file": file.resolved(), "version": f"{__version__}-{digest}-{_STORE}"}
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
        if self._known_pairs is not None:
            self._known_pairs += known_pairs(dataset)
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

    def answers(self, query: int) -> set[int]:
        """Ids of what is known to answer a query, which goes by its id, and the query's own; empty where answers are not
        left out."""
        if self._known is None:
            return set()
        mined = () if self.mined is None else self.mined.answers(query)
        return {query, *self._known.of(query).tolist(), *mined}

    def _negatives(self, rng: random.Random, index: int, record: dict[str, Any]) -> list[Negative]:
        """The negatives that an example may have."""
        columns = ["neg", "neg_ids", "negative_queries", "negative_query_ids"]
        columns += ["neg_scores"] * self.args.knowledge_distillation
        found = None if self.mined is None else self.mined.get(index)
        if found is None:
            found = [Negative(*values) for values in zip(*(record[name] for name in columns))]
        if not found:
            return self._positives_of_others(rng, record, self._part_of[index])
        if not self.leave_out_answers:
            return found
        answers = self.answers(record["query_id"]) | set(record["pos_ids"])
        first = {negative.id: negative for negative in reversed(found)}
        return [n for n in found if n.id not in answers and first[n.id] is n]

    def __getitem__(self, draw: Draw) -> Example:
        epoch, index = draw
        record, part = self.dataset[index], self._part_of[index]
        rng = random.Random(f"{self.seed}-{epoch}-{index}")
        positive = rng.randrange(len(record["pos"]))
        wanted, rejected = self.group_size(part) - 1, self._rejected(record, positive)
        negatives = [n for n in self._negatives(rng, index, record) if n.id not in rejected]
        drawn = _sample(rng, len(negatives), wanted, again=not self.leave_out_answers)
        filling = wanted - len(drawn)
        texts = [self._shuffle_words(rng, record["pos"][positive]), *(negatives[i].text for i in drawn)]
        texts += [min(texts, key=len)] * filling
        queries = [self._draw_queries(rng, negatives[i], record["query_id"]) for i in drawn] + [[]] * filling
        scores = None
        if self.args.knowledge_distillation:
            scores = [record["pos_scores"][positive], *(negatives[i].score for i in drawn)] + [-math.inf] * filling
        query_ids = [[number for _, number in some] for some in queries]
        ids = TextIds(
            query=record["query_id"],
            passages=[record["pos_ids"][positive], *(negatives[i].id for i in drawn)] + [-1] * filling,
            negative_queries=query_ids,
            answers=[self.answers(record["query_id"]) | rejected]
            + [self.answers(number) for some in query_ids for number in some],
        )

        def prompted(query: str) -> str:
            if not (prompt := self.args.query_instruction_for_retrieval):
                return query
            prompt = prompt if record["prompt"] is None else record["prompt"]
            return self.args.query_instruction_format.format(prompt, query)

        symmetric = record["type"] in ("symmetric_sts", "symmetric_clustering")
        return Example(
            query=prompted(record["query"]),
            passages=[prompted(text) if symmetric else self._prompted_passage(text) for text in texts],
            negative_queries=[[prompted(query) for query, _ in some] for some in queries],
            teacher_scores=scores,
            in_batch_negatives=self.in_batch_negatives[part],
            expert=self._experts[part],
            ids=ids,
        )

    def _rejected(self, record: dict[str, Any], positive: int) -> set[int]:
        """Ids of the line's negatives that its guide takes for answers."""
        return set() if self.guide_margin is None else rejected(record, positive, self.guide_margin)

    def _positives_of_others(self, rng: random.Random, record: dict[str, Any], part: int) -> list[Negative]:
        """Positives of other queries of a part for one that has no negatives; where there are none, its own, unless answers
        are left out."""
        found: dict[int, Negative] = {}
        answers = self.answers(record["query_id"]) | {record["query_id"], *record["pos_ids"]}
        size, wanted = self.part_sizes[part], self.group_size(part) - 1
        for number in rng.sample(range(size), min(size, 4 * wanted + 4)):
            other = self.dataset[self._starts[part] + number]
            chosen = rng.randrange(len(other["pos"]))
            text, number = other["pos"][chosen], other["pos_ids"][chosen]
            if other["query_id"] != record["query_id"] and number not in answers:
                found.setdefault(number, Negative(text, number, [], []))
            if len(found) == wanted:
                break
        own = [] if self.leave_out_answers else [Negative(record["pos"][0], record["pos_ids"][0], [], [])]
        return list(found.values()) or own

    def _draw_queries(self, rng: random.Random, negative: Negative, own: int) -> list[tuple[str, int]]:
        """At most ``queries_per_negative`` of the queries that a negative answers, each with its id."""
        found = [(q, number) for q, number in zip(negative.queries, negative.query_ids) if number != own]
        limit = self.args.queries_per_negative
        return found if len(found) <= limit else rng.sample(found, limit)

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


def _sample(rng: random.Random, available: int, wanted: int, again: bool) -> list[int]:
    """``wanted`` of ``available`` places. Where there are fewer, each comes once; or, with ``again``, none comes a second time
    before every one has come once."""
    chosen: list[int] = []
    while len(chosen) < wanted and available and (again or not chosen):
        chosen += rng.sample(range(available), min(available, wanted - len(chosen)))
    return chosen


def _count(part: datasets.Dataset, column: str, which: Callable[[Any], Any]) -> int:
    """How many examples of a part have a value for which an arrow function is true."""
    batches = part.select_columns(column).with_format("arrow").iter(_ROWS_AT_ONCE)
    return sum(pc.sum(which(batch[column])).as_py() for batch in batches)


def _are_texts(texts: Any) -> Any:
    return pc.fill_null(pc.not_equal(texts, ""), False)


def _are_empty(lists: Any) -> Any:
    return pc.equal(pc.list_value_length(lists), 0)


def _with_ids(example: dict[str, Any]) -> dict[str, Any]:
    """An example with the ids of its texts."""
    return example | {
        "query_id": text_id(example["query"]),
        "pos_ids": list(map(text_id, example["pos"])),
        "neg_ids": list(map(text_id, example["neg"])),
        "negative_query_ids": [list(map(text_id, queries)) for queries in example["negative_queries"]],
    }


def _read_for_arrow(file: DataFile, version: str, with_scores: bool):
    del version  # part of the store's name only: a changed file, or any after an update of this package, is read again
    examples = read_examples(file, with_scores=with_scores)
    for example in tqdm(examples, desc=f"read {Path(file.name).name}", unit="line", delay=2, leave=False):
        yield _with_ids(example)


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
