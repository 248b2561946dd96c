"""Options of ``prepare``: those that all sources share, and those of each source."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, make_dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

from clpl_moe.common.errors import OptionError, UserError
from clpl_moe.prepare.source import Source, registered_sources
from clpl_moe.retrieval.collection import check_language


@dataclass(kw_only=True)
class PrepareArguments:
    """What all sources share; :func:`prepare_arguments` adds the options of each.

    Attributes:
        reader: the source that was chosen, with its options.
    """

    output: str = field(metadata={"help": "folder for collections"})
    language: str | None = field(
        default=None,
        metadata={"help": "name of the collection's folder inside output, such as ko; with miracl its language"},
    )
    titles: bool = field(default=True, metadata={"help": "give each passage the title of its article"})
    overwrite: bool = field(default=False, metadata={"help": "replace the collection that is there"})

    if TYPE_CHECKING:  # the options of the sources

        def __getattr__(self, name: str) -> Any: ...

    def __post_init__(self) -> None:
        self.reader = self._choose()
        if (default := self.reader.default_language()) is not None:
            self.language = self.language or default
        if self.language is None:
            raise OptionError("language", f"missing, expected the name of the folder inside {self.output}, such as ko")
        check_language(self.language)

    def _choose(self) -> Source:
        sources = {cls.name: cls for cls in registered_sources()}
        named = [name for name in sources if getattr(self, name, None) is not None]
        if len(named) != 1:
            *most, last = sources
            found = " and ".join(named) or "none"
            raise UserError(f"found {found}, expected one of {', '.join(most)} and {last}")
        chosen = sources[named[0]]
        own = {option.name for option in fields(chosen)}
        for option in fields(self):
            users = [name for name, cls in sources.items() if option.name in {own.name for own in fields(cls)}]
            if users and option.name not in own and getattr(self, option.name) != option.default:
                raise OptionError(option.name, f"goes with {' and '.join(users)}, not with {chosen.name}")
        return chosen(**{name: getattr(self, name) for name in own})


def prepare_arguments() -> type[PrepareArguments]:
    """:class:`PrepareArguments` with the options of every registered source."""
    kinds: dict[str, tuple[Any, Any]] = {}  # name of the option -> type and default
    helps: dict[str, list[str]] = {}
    for cls in registered_sources():
        types = get_type_hints(cls)
        for option in fields(cls):
            text = option.metadata.get("help", "")
            if option.name == cls.name:
                kinds[option.name] = (types[option.name] | None, None)
                helps[option.name] = [text]
            else:
                kinds[option.name] = (types[option.name], option.default)
                helps.setdefault(option.name, []).append(f"with {cls.name}: {text}")
    options = [
        (name, kind, field(default=default, metadata={"help": "; ".join(helps[name])}))
        for name, (kind, default) in kinds.items()
    ]
    return make_dataclass("PrepareArguments", options, bases=(PrepareArguments,), kw_only=True)
