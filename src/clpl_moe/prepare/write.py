"""Collections larger than memory: passages go from the source to ``corpus.jsonl`` line by line.

Queries and judgements are in memory. Of each passage only a hash of its id stays, 8 bytes, by which an id that stands
twice is found in the end.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from clpl_moe.common.errors import UserError, at
from clpl_moe.common.files import atomic_dir, write_jsonl
from clpl_moe.prepare.source import Passage, Split
from clpl_moe.retrieval.collection import normalize_text


def write_collection(
    folder: Path,
    splits: Mapping[str, Split],
    read_passages: Callable[[], Iterable[Passage]],
    *,
    id_field: str,
    titles: bool,
) -> Counter[str]:
    """Write a collection, whole or not at all, and return counts of what it holds.

    ``read_passages`` is called again if an id stands twice, to say where.

    Raises:
        UserError: an id stands twice; the message names its place and ``id_field``.
    """
    relevant = {p for split in splits.values() for (_, p), grade in split.judgements.items() if grade > 0}
    counts: Counter[str] = Counter()
    hashes = array("q")  # 8 bytes a passage: Python's own strings in a set take 100 and more

    def lines() -> Iterator[dict[str, Any]]:
        for passage in read_passages():
            hashes.append(hash(passage.id))
            relevant.discard(passage.id)
            counts["passages without text"] += not passage.text.strip()
            # No field `split`, which would reserve the passage to one: in MIRACL and BEIR all splits search one corpus,
            # and a passage judged for a dev query is a fair negative for a train query.
            yield {"id": passage.id, "title": passage.title if titles else "", "text": passage.text}

    with atomic_dir(folder) as temporary:
        write_jsonl(temporary / "corpus.jsonl", lines())
        _refuse_repeated_ids(hashes, read_passages, id_field)
        counts["passages"] = len(hashes)
        for name, split in splits.items():
            write_jsonl(temporary / f"{name}_queries.jsonl", ({"id": i, "text": t} for i, t in split.queries.items()))
            write_jsonl(
                temporary / f"{name}_qrels.jsonl",
                ({"qid": q, "docid": p, "relevance": grade} for (q, p), grade in split.judgements.items()),
            )
            counts[f"{name} queries"] = len(split.queries)
            counts[f"{name} queries without judgement"] = len(split.queries.keys() - {q for q, _ in split.judgements})
            counts[f"{name} judgements: relevant"] = sum(grade > 0 for grade in split.judgements.values())
            counts[f"{name} judgements: not relevant"] = sum(grade <= 0 for grade in split.judgements.values())
    counts["relevant passages that the corpus lacks"] = len(relevant)
    if "train" in splits:
        others = {normalize_text(text) for name in splits.keys() - {"train"} for text in splits[name].queries.values()}
        trained = map(normalize_text, splits["train"].queries.values())
        counts["train queries that equal a query of another split (kept)"] = sum(text in others for text in trained)
    return +counts


def _refuse_repeated_ids(hashes: array, read_passages: Callable[[], Iterable[Passage]], id_field: str) -> None:
    import numpy as np

    ordered = np.sort(np.frombuffer(hashes, dtype=np.int64))
    repeated = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    if not repeated:
        return
    places: dict[str, str] = {}  # a second reading says where; two ids of one hash are no fault
    for number, passage in enumerate(read_passages(), 1):
        if hash(passage.id) in repeated:
            place = passage.place or f"passage {number}"
            if passage.id in places:
                raise UserError(f"{at(place, field=id_field)}: '{passage.id}' stands at {places[passage.id]} already")
            places[passage.id] = place
