"""What a source is: a kind of data set that ``prepare`` makes a collection of, and its options."""

from __future__ import annotations

from abc import ABC
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple, TypeVar


class Passage(NamedTuple):
    """A passage of a source; ``place`` says where it was read, for messages."""

    id: str
    text: str
    title: str = ""
    place: str = ""


@dataclass
class Split:
    """Queries and judgements of one split.

    Attributes:
        queries: id -> text.
        judgements: (query id, passage id) -> relevance; 0 is an explicit negative.
    """

    queries: dict[str, str]
    judgements: dict[tuple[str, str], int]


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
        """Write the collection's folder, whole or not at all; returns counts of what was read and left out, by name."""
        from clpl_moe.prepare.write import write_collection

        return write_collection(folder, self.read_splits(), self.read_passages, id_field=self.id_field, titles=titles)


SourceClass = TypeVar("SourceClass", bound=type[Source])
_SOURCES: dict[str, type[Source]] = {}


def register_source(name: str) -> Callable[[SourceClass], SourceClass]:
    """Decorate a :class:`Source` to make it an option of ``prepare``.

    The class is a dataclass. Its fields become options of ``prepare``; the field called ``name`` chooses the source.

    Raises:
        ValueError: the class has no field of that name, another field has no default, the name is taken, or another
            source has one of the options with another default.
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
