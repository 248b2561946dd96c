"""Negatives mined again while training goes on, as ANCE does (arXiv:2007.00808).

When a refresh is due:

1. The current weights encode the corpus; processes share this.
2. Negatives of every example are selected as ``mine`` selects them. Excluded is what any line of the data or the collection
   knows to answer the example's query, and a passage that is the query itself.
3. The training set goes on with these negatives. Each brings the queries that it answers by the collection's judgements
   and by ``positive_queries.jsonl``; a negative without any only lacks the penalty. Where no negative is left for an
   example, its last ones stay.

Checkpoints hold the ids of the negatives in use, with which a resumed run goes on.
"""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clpl_moe.common.errors import OptionError, UserError, at
from clpl_moe.common.files import read_jsonl, write_jsonl
from clpl_moe.common.text_key import text_key
from clpl_moe.data.dataset import CLPLTrainDataset, Negative
from clpl_moe.encoder import Encoder
from clpl_moe.mine.index import PassageIndex
from clpl_moe.mine.options import SelectionArguments
from clpl_moe.mine.rank import MiningQuery
from clpl_moe.mine.select import NegativeMiner
from clpl_moe.retrieval.options import EncodingArguments

NEGATIVES_FILE = "negatives.jsonl"


class MinedNegatives:
    """The negatives of a refresh, as the training set takes them: ``places`` has each example's places in the index."""

    def __init__(self, index: PassageIndex, places: dict[int, list[int]]) -> None:
        self._index = index
        self.places = places

    def get(self, example: int) -> list[Negative] | None:
        """An example's negatives; None: the file's negatives stay."""
        places, index = self.places.get(example), self._index
        if places is None:
            return None
        queries = ((index.negative_queries(p), index.negative_query_ids(p)) for p in places)
        return [Negative(index.texts[p], int(index.ids[p]), *known) for p, known in zip(places, queries)]

    def answers(self, query: int) -> list[int]:
        """Ids of the passages that the collection knows to answer a query."""
        return [int(self._index.ids[place]) for place in self._index.answering_id(query)]


class NegativeRefresher:
    """Mines negatives and gives them to the training set, ``every`` epoch or number of optimizer steps.

    All draws depend on ``seed`` and the step. ``folder`` holds the corpus's embeddings during a refresh. Raises
    :class:`UserError` where no example takes passages of a corpus.
    """

    def __init__(
        self,
        dataset: CLPLTrainDataset,
        index: PassageIndex,
        selection: SelectionArguments,
        encoding: EncodingArguments,
        *,
        every: str | int,
        seed: int,
        folder: Path,
    ) -> None:
        self.dataset, self.index, self.selection, self.encoding = dataset, index, selection, encoding
        self.every, self.seed, self.folder = every, seed, folder
        # Of the negatives in use, and the step that they were mined at; step 0: every example has its file's own.
        self._places: dict[int, list[int]] = {}
        self._last_step = 0
        self._numbers: list[int] = []
        self._queries: list[MiningQuery] = []
        themselves = index.themselves()
        for number, record in enumerate(dataset.dataset):
            if (record["type"] or "").startswith("symmetric"):  # its "passages" are queries
                continue
            found = [index.find(text) for text in record["pos"]]
            positives = list(dict.fromkeys(place for place in found if place is not None))
            others = [text for text, place in zip(record["pos"], found) if place is None]
            query = record["query"]
            known = (index.find_id(number) for number in dataset.answers(record["query_id"]) | {record["query_id"]})
            excluded = index.answering(query) | set(positives) | themselves.get(text_key(query), set())
            excluded |= {place for place in known if place is not None}
            self._numbers.append(number)
            self._queries.append(MiningQuery(str(number), query, positives, excluded, others))
        if not self._queries:
            raise OptionError(
                "ance_refresh", "all examples are of a symmetric type, for which no passages are mined; unset it"
            )

    def due(self, step: int, steps_per_epoch: int) -> bool:
        """Whether to mine before the step that follows ``step``. Never before the first one: it takes the files' negatives."""
        return step > self._last_step and step % self._every(steps_per_epoch) == 0

    def _every(self, steps_per_epoch: int) -> int:
        return steps_per_epoch if self.every == "epoch" else int(self.every)

    def refresh(
        self, encoder: Encoder, step: int, steps_per_epoch: int, gather: Callable[[Any], list[Any]], first: bool
    ) -> dict[str, float]:
        """Mine with the encoder's current weights after ``step`` steps, and return figures for the log.

        All processes have to call this; ``gather`` gives each of them the values of all in order.
        """
        start = time.perf_counter()
        miner = NegativeMiner(
            index=self.index,
            selection=self.selection,
            encoding=self.encoding,
            encoder=encoder,
            seed=f"{self.seed}-{step}",
            cache=self.folder,
            progress=False,
        )
        found = miner.mine(self._queries)
        places = {number: mined.places for number, mined in zip(self._numbers, found, strict=True) if mined.places}
        # Devices may round differently: all take the first process's.
        places = gather(places if first else None)[0]
        if first:
            shutil.rmtree(self.folder, ignore_errors=True)
        total = sum(map(len, places.values()))
        changed = sum(len(set(new) - self._before(number)) for number, new in places.items())
        self._use(self._places | places, step)
        return {
            "ance_refresh": step // self._every(steps_per_epoch),
            "ance_negatives": total,
            "ance_changed": changed,
            "ance_kept_examples": len(self.dataset) - len(places),
            "ance_seconds": round(time.perf_counter() - start, 2),
        }

    def _before(self, number: int) -> set[int | None]:
        """Places of an example's negatives up to now; None stands for any that are not in the corpus."""
        if number in self._places:
            return set(self._places[number])
        return {self.index.find(text) for text in self.dataset.dataset[number]["neg"]}

    def _use(self, places: dict[int, list[int]], step: int) -> None:
        self.dataset.mined = MinedNegatives(self.index, places)
        self._places, self._last_step = places, step

    def save(self, path: Path) -> None:
        """Write the ids of the negatives in use; nothing before the first refresh."""
        if not self._last_step:
            return
        ids = ((number, [self.index.passage_id(p) for p in places]) for number, places in self._places.items())
        lines = ({"example": number, "neg_ids": found} for number, found in ids)
        write_jsonl(path, itertools.chain([{"step": self._last_step}], lines))

    def load(self, path: Path) -> None:
        """Go on with the negatives that :meth:`save` wrote, if any; refuse those of another collection."""
        if not path.exists():
            return
        records = [record for _, record in read_jsonl(path)]
        places = self.index.places({p for record in records[1:] for p in record["neg_ids"]})
        try:
            found = {record["example"]: [places[p] for p in record["neg_ids"]] for record in records[1:]}
        except KeyError as error:
            raise UserError(
                f"{at(path)}: passage {error} is not in {self.index.source}; resume with the ance_collection that the run"
                " began with"
            ) from None
        self._use(found, records[0]["step"])
