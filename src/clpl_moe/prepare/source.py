"""What a source is: a kind of data set that ``prepare`` makes a collection of, and its options.

Queries and judgements are held in memory; passages may be larger.
"""

from __future__ import annotations

from abc import ABC
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

from clpl_moe.common.errors import UserError, at
from clpl_moe.common.files import write_jsonl
from clpl_moe.common.output import atomic_dir
from clpl_moe.retrieval.collection import check_relevance, normalize_text


class Passage(NamedTuple):
    """A passage of a source; ``place`` says where it was read, for messages."""

    id: str
    text: str
    title: str = ""
    place: str = ""


@dataclass
class Split:
    """Queries and judgements of one split."""

    queries: dict[str, str]  # id -> text
    judgements: dict[tuple[str, str], int]  # query id and passage id -> relevance; 0 is an explicit negative

    def write(self, folder: Path, name: str) -> None:
        for grade in self.judgements.values():
            check_relevance(grade, f"{name}_qrels.jsonl", None, "relevance")
        write_jsonl(folder / f"{name}_queries.jsonl", ({"id": i, "text": text} for i, text in self.queries.items()))
        qrels = ({"qid": q, "docid": p, "relevance": grade} for (q, p), grade in self.judgements.items())
        write_jsonl(folder / f"{name}_qrels.jsonl", qrels)


class Source(ABC):
    """A kind of data set. A subclass is a dataclass whose fields are its options, see :func:`register_source`.

    It defines :meth:`read_splits` and :meth:`read_passages`, or :meth:`write` where it needs all of the data at once.
    A wrong value of an option raises :class:`OptionError` in its ``__post_init__``.

    Attributes:
        name: of the source, and of the option that chooses it.
        id_field: name of the field that holds a passage's id, for messages.
        note: printed after the collection's name.
    """

    __dataclass_fields__: ClassVar[dict[str, Field]]
    name: ClassVar[str]
    id_field: ClassVar[str] = "id"
    note: ClassVar[str] = ""

    def default_language(self) -> str | None:
        """Name of the collection's folder where the user gives none; None: the user has to."""
        return None

    def files(self) -> list[str]:
        """The files and folders to read, which the collection must not replace."""
        return []

    def read_splits(self) -> dict[str, Split]:
        """Queries and judgements of each split. Read before the passages, so that their faults show at once."""
        raise NotImplementedError

    def read_passages(self) -> Iterable[Passage]:
        """The passages, one by one: they may be larger than the memory. Read a second time if an id stands twice."""
        raise NotImplementedError

    def write(self, folder: Path, titles: bool) -> Counter[str]:
        """Write the collection's folder, whole or not at all; returns counts of what was read and left out, by name.

        Passages go to ``corpus.jsonl`` line by line. Of each only a hash of its id stays, by which an id that stands
        twice is found in the end.
        """
        splits = self.read_splits()
        relevant = {p for split in splits.values() for (_, p), grade in split.judgements.items() if grade > 0}
        counts: Counter[str] = Counter()
        hashes = array("q")  # 8 bytes a passage: Python's own strings in a set take 100 and more

        def lines() -> Iterator[dict[str, Any]]:
            for passage in self.read_passages():
                hashes.append(hash(passage.id))
                relevant.discard(passage.id)
                counts["passages without text"] += not passage.text.strip()
                # No field `split`, which would reserve the passage to one: in MIRACL and BEIR all splits search one
                # corpus, and a passage judged for a dev query is a fair negative for a train query.
                yield {"id": passage.id, "title": passage.title if titles else "", "text": passage.text}

        with atomic_dir(folder) as temporary:
            write_jsonl(temporary / "corpus.jsonl", lines())
            self._refuse_repeated_ids(hashes)
            counts["passages"] = len(hashes)
            for name, split in splits.items():
                split.write(temporary, name)
                grades, judged = split.judgements.values(), {query_id for query_id, _ in split.judgements}
                counts[f"{name} queries"] = len(split.queries)
                counts[f"{name} queries without judgement"] = len(split.queries.keys() - judged)
                counts[f"{name} judgements: relevant"] = sum(grade > 0 for grade in grades)
                counts[f"{name} judgements: not relevant"] = sum(grade <= 0 for grade in grades)
        counts["relevant passages that the corpus lacks"] = len(relevant)
        if "train" in splits:
            others = {normalize_text(t) for name in splits.keys() - {"train"} for t in splits[name].queries.values()}
            trained = map(normalize_text, splits["train"].queries.values())
            counts["train queries that equal a query of another split (kept)"] = sum(text in others for text in trained)
        return +counts

    def _refuse_repeated_ids(self, hashes: array) -> None:
        import numpy as np

        ordered = np.sort(np.frombuffer(hashes, dtype=np.int64))
        repeated = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
        places: dict[str, str] = {}  # a second reading says where; two ids of one hash are no fault
        for number, passage in enumerate(self.read_passages() if repeated else (), 1):
            if hash(passage.id) in repeated:
                place = passage.place or f"passage {number}"
                if passage.id in places:
                    first = places[passage.id]
                    raise UserError(f"{at(place, field=self.id_field)}: '{passage.id}' stands at {first} already")
                places[passage.id] = place


SourceClass = TypeVar("SourceClass", bound=type[Source])
_SOURCES: dict[str, type[Source]] = {}


def register_source(name: str) -> Callable[[SourceClass], SourceClass]:
    """Decorate a :class:`Source`, a dataclass, so that its fields become options of ``prepare``.

    The field called ``name`` chooses the source. :class:`ValueError` if there is none, another field has no default, the
    name is taken, or another source has one of the options with another default.
    """

    def register(cls: SourceClass) -> SourceClass:
        own = {field.name: field for field in fields(cls)} if is_dataclass(cls) else {}
        if name not in own:
            raise ValueError(f"{cls.__name__}: expected a dataclass with a field '{name}', the option that chooses it")
        if missing := [option for option, field in own.items() if option != name and field.default is MISSING]:
            raise ValueError(f"{cls.__name__}: expected a default for option '{missing[0]}'")
        for other, theirs in _SOURCES.items():
            if other == name and theirs.__qualname__ != cls.__qualname__:
                raise ValueError(f"{cls.__name__}: there is a source '{name}' already, {theirs.__name__}")
            for field in fields(theirs):
                if other != name and field.name in own and field.default != own[field.name].default:
                    raise ValueError(f"{cls.__name__}: option '{field.name}' has another default in source '{other}'")
        cls.name = name
        _SOURCES[name] = cls
        return cls

    return register


def registered_sources() -> Iterator[type[Source]]:
    """The sources in alphabetical order, the package's own among them."""
    from clpl_moe.prepare import sources  # noqa: F401  (registers them)

    return (cls for _, cls in sorted(_SOURCES.items()))
