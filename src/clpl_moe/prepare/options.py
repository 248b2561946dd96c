"""Options of ``prepare``: those that all sources share, and those of each source."""

from __future__ import annotations

from dataclasses import dataclass, fields, make_dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

from clpl_moe.common.errors import OptionError, UserError
from clpl_moe.common.options import check_outputs, option
from clpl_moe.prepare.source import Source, registered_sources
from clpl_moe.retrieval.collection import check_language

_NO_TITLES = "-no-titles"  # in a collection's name, which its results have too


@dataclass(kw_only=True)
class PrepareArguments:
    """What all sources share; :func:`prepare_arguments` adds the options of each. ``reader`` is the source chosen."""

    output: str = option("folder for collections")
    language: str | None = option(
        "name of the collection's folder inside output, such as ko; with miracl, ir_dataset and hub's subset their"
        " language, without titles ko-no-titles",
        None,
    )
    titles: bool = option("give each passage the title of its article", True)
    overwrite: bool = option("replace the collection that is there", False)

    if TYPE_CHECKING:  # the options of the sources

        def __getattr__(self, name: str) -> Any: ...

    def __post_init__(self) -> None:
        check_outputs(self, "output")
        self.reader = self._choose()
        if (default := self.reader.default_language()) is not None:
            self.language = self.language or (default if self.titles else f"{default}{_NO_TITLES}")
        if self.language is None:
            raise OptionError("language", f"missing, expected the name of the folder inside {self.output}, such as ko")
        check_language(self.language)

    def _choose(self) -> Source:
        sources = {cls.name: cls for cls in registered_sources()}
        named = [name for name in sources if getattr(self, name, None) is not None]
        if len(named) != 1:
            *most, last = sources
            found = " and ".join(named) or "none"
            raise UserError(f"sources to prepare from: found {found}, set one of {', '.join(most)} or {last}")
        chosen = sources[named[0]]
        own = {known.name for known in fields(chosen)}
        for known in fields(self):
            users = [name for name, cls in sources.items() if known.name in {f.name for f in fields(cls)}]
            if users and known.name not in own and getattr(self, known.name) != known.default:
                raise OptionError(known.name, f"goes with {' and '.join(users)}, not with {chosen.name}")
        return chosen(**{name: getattr(self, name) for name in own})


def prepare_arguments() -> type[PrepareArguments]:
    """:class:`PrepareArguments` with the options of every registered source."""
    kinds: dict[str, tuple[Any, Any]] = {}  # name of the option -> type and default
    helps: dict[str, list[str]] = {}
    for cls in registered_sources():
        types = get_type_hints(cls)
        for known in fields(cls):
            name, text = known.name, known.metadata.get("help", "")
            chooses = name == cls.name
            kinds[name] = (types[name] | None, None) if chooses else (types[name], known.default)
            helps.setdefault(name, []).append(text if chooses else f"with {cls.name}: {text}")
    options = [(name, kind, option("; ".join(helps[name]), default)) for name, (kind, default) in kinds.items()]
    return make_dataclass("PrepareArguments", options, bases=(PrepareArguments,), kw_only=True)
