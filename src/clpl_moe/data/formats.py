"""The files and tables that training data may lie in, and one reader of them all.

An entry of ``train_data`` is

- a file: JSONL, plain or compressed (``.gz``, ``.zst``); JSON with a list of objects, or LlamaIndex's data sets
  (``queries``, ``corpus``, ``relevant_docs``); parquet, arrow, CSV, TSV;
- a folder of such files, or one that ``datasets`` has saved;
- ``hub:NAME``, a data set of the Hugging Face hub.

Settings may follow, as in ``hub:owner/name,split=train,query=question,pos=answer``: ``split``; of the hub also ``config``
and ``revision``; the columns of the fields; ``header=false`` for a table without a line of names (query, positive, then
negatives, as MS MARCO's triples); ``queries`` and ``corpus``, the tables of the texts where lines have ids
(:mod:`clpl_moe.data.by_ids`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from clpl_moe.common.cli import nearest
from clpl_moe.common.compressed import open_bytes, plain_name
from clpl_moe.common.errors import UserError, at, no_such, type_name
from clpl_moe.common.files import (
    LONE_SURROGATE,
    has_lone_surrogates,
    hash_file,
    inspect_line,
    parse_json,
    read_json,
    read_lines,
)
from clpl_moe.common.hub_data import load_rows
from clpl_moe.data.by_ids import TextsById, lines_by_ids
from clpl_moe.data.columns import FIELDS, Columns, is_list_as_text
from clpl_moe.data.tables import CELLS, TEXT_TABLES, arrow_rows, parquet_rows, text_rows

HUB = "hub:"
_LINES = (".jsonl", ".json", ".ndjson")
_ROWS = {".parquet": parquet_rows, ".arrow": arrow_rows}
_ENDINGS = (*_LINES, *_ROWS, *TEXT_TABLES)
_SPREADSHEETS = (".xlsx", ".xls", ".ods")
_NO_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # `datasets` writes them
_TABLES = ("queries", "corpus")  # of texts, where lines have their ids
_SETTINGS = ("split", "config", "revision", "header", *_TABLES, *FIELDS)
_LLAMA_INDEX = ("queries", "corpus", "relevant_docs")


@dataclass
class Line:
    """One line or row: its fields, as far as it could be read."""

    place: str  # for messages
    number: int  # from 1
    record: dict[str, Any] | None
    faults: list[str] = field(default_factory=list)  # of the reading; those of the fields are found by the schema
    origin: Mapping[str, str] = field(default_factory=dict)  # field -> the column that it came from, where another
    size: int = 0  # in bytes, where it is known


@dataclass(frozen=True)
class DataFile:
    """One file, or one data set of the hub, with what says how it is read."""

    name: str  # for messages, as it was given
    path: str
    settings: Mapping[str, str] = field(default_factory=dict)

    def __fspath__(self) -> str:
        return self.path

    @property
    def paths(self) -> list[str]:
        """The files that are read: its own, and the tables that its ids are of."""
        return [self.path, *self._tables.values()]

    @property
    def is_hub(self) -> bool:
        return self.path.startswith(HUB)

    @property
    def ending(self) -> str:
        """What the file's name ends in, in lower case, without its compression's."""
        return Path(plain_name(self.path)).suffix

    @property
    def size(self) -> int | None:
        """In bytes; None where lines have none."""
        path = Path(self.path)
        return path.stat().st_size if self.ending not in (*_ROWS, *TEXT_TABLES) and path.is_file() else None

    def resolved(self) -> DataFile:
        """The same file, however it may be reached."""
        if self.is_hub:
            return DataFile(self.name, self.path, dict(self.settings))
        tables = {name: str(Path(path).resolve()) for name, path in self._tables.items()}
        return DataFile(self.name, str(Path(self.path).resolve()), {**self.settings, **tables})

    @property
    def _tables(self) -> dict[str, str]:
        return {name: self.settings[name] for name in _TABLES if name in self.settings}

    def digest(self) -> str:
        """A hash of the content and of the settings that decide what is read of it."""
        if not self.is_hub:
            content = "".join(map(hash_file, self.paths))
            return content if not self.settings else hashlib.sha256(f"{content}{self._settings}".encode()).hexdigest()
        digest = hashlib.sha256(self._settings.encode())
        for row in self._of_the_hub:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    @property
    def _settings(self) -> str:
        return json.dumps(dict(sorted(self.settings.items())))

    def lines(self) -> Iterator[Line]:
        """Every line or row, in order; :class:`UserError` where the file as a whole cannot be read or is empty."""
        columns = Columns({name: column for name, column in self.settings.items() if name in FIELDS})
        empty = True
        try:
            for line in self._lines(columns):
                empty = False
                yield line
        except UserError as error:
            known = self.is_hub or self.path == self.name
            raise UserError(str(error) if known else str(error).replace(self.path, self.name)) from None
        if empty:
            raise UserError(f"{at(self.name)}: the file is empty, expected at least one row")

    def _lines(self, columns: Columns) -> Iterator[Line]:
        if self.is_hub:
            yield from self._table(columns, self._of_the_hub.column_names, iter(self._of_the_hub))
        elif self._tables:
            yield from self._by_ids()
        elif self.ending in _ROWS:
            yield from self._table(columns, *_ROWS[self.ending](self.path, self.name))
        elif self.ending in TEXT_TABLES:
            header = self.settings.get("header") != "false"
            yield from self._table(columns, *text_rows(self.path, self.name, header=header), text_cells=True)
        elif self.ending == ".json" and (content := self._whole_json()) is not None:
            yield from self._json(columns, content)
        else:
            for number, _, raw in read_lines(self.path):
                record, faults = inspect_line(raw)
                yield _object(columns, Line(at(self.name, number), number, record, faults, size=len(raw)))

    def _table(
        self, columns: Columns, names: Sequence[str], rows: Iterator[dict[str, Any]], text_cells: bool = False
    ) -> Iterator[Line]:
        hint = f"name yours, as in {self.name},query=COLUMN,pos=COLUMN"
        if text_cells:
            hint += f"; of a file without a line of names: {self.name},header=false"
        columns.refuse(at(self.name), names, hint)
        for number, row in enumerate(rows, 1):
            line = Line(f"{self.name}: row {number}", number, None)
            if (cells := row.pop(CELLS, None)) is not None:
                line.faults.append(f"found {cells} cells, expected {len(names)}")
            else:
                line.record, line.origin = columns.fields(row, table=True, text_cells=text_cells)
                for name in ("pos", "neg") if text_cells else ():
                    if any(map(is_list_as_text, line.record.get(name) or ())):
                        fault = "found a list that was written as a text, expected one passage a cell"
                        fault = (
                            f"field '{line.origin.get(name, name)}': {fault}; write JSONL or parquet, which have lists"
                        )
                        line.faults.append(fault)
            yield line

    def _by_ids(self) -> Iterator[Line]:
        with contextlib.ExitStack() as stack:
            tables = [stack.enter_context(contextlib.closing(TextsById(self.settings[name]))) for name in _TABLES]
            for number, record, faults in lines_by_ids(self.path, *tables):
                yield Line(at(self.name, number), number, record, faults)

    def _json(self, columns: Columns, content: Any) -> Iterator[Line]:
        if isinstance(content, list):
            for number, record in enumerate(content, 1):
                line = Line(f"{self.name}: row {number}", number, None)
                if isinstance(record, dict):
                    line.record = record
                else:
                    line.faults.append(f"found {type_name(record)}, expected a JSON object")
                yield _object(columns, line)
            return
        queries, corpus, relevant = (content[name] for name in _LLAMA_INDEX)
        for number, (identifier, found) in enumerate(relevant.items(), 1):
            line = Line(f"{self.name}: query '{identifier}'", number, None)
            missing = [i for i in found if i not in corpus] if isinstance(found, list) else []
            if identifier not in queries or not isinstance(found, list) or missing:
                what = f"passages {missing!r:.60}" if missing else "its text" if isinstance(found, list) else "a list"
                line.faults.append(f"field 'relevant_docs': {what} not found, expected ids of 'queries' and 'corpus'")
            else:
                texts = {"query": queries[identifier], "pos": [corpus[i] for i in found], "neg": []}
                line.record = {"query_id": identifier, "pos_ids": found, **texts}
            yield line

    def _whole_json(self) -> Any:
        """The value of a file that is no JSONL: a list, or an object of LlamaIndex's; None: it is JSONL."""
        with open_bytes(self.path) as (content, _):
            start = next((line for line in content if line.strip()), b"").lstrip(b"\xef\xbb\xbf \t\r\n")
            if not start.startswith((b"[", b"{")):
                return None
            if start.startswith(b"{"):
                try:
                    first = parse_json(start)
                except ValueError:
                    first = None  # an object of many lines, or a broken line
                if first is not None and not all(name in first for name in _LLAMA_INDEX):
                    return None
            raw = start + content.read()
        try:
            value = parse_json(raw)
        except ValueError:
            return None
        if has_lone_surrogates(value, raw):
            raise UserError(f"{at(self.name)}: {LONE_SURROGATE}")
        tables = isinstance(value, dict) and [value.get(name) for name in _LLAMA_INDEX]
        return value if isinstance(value, list) or (tables and all(isinstance(t, dict) for t in tables)) else None

    @cached_property
    def _of_the_hub(self) -> Any:
        """A data set of the hub, memory-mapped from the cache that it is fetched into."""
        config, split = self.settings.get("config"), self.settings.get("split", "train")
        how = {"split": split, "revision": self.settings.get("revision")}
        return load_rows(self.path.removeprefix(HUB), config, shown=self.name, **how)


def _object(columns: Columns, line: Line) -> Line:
    """A line whose record is an object as the file has it, with this package's fields."""
    if line.record is not None:
        names = line.record
        line.record, line.origin = columns.fields(names)
        if any(isinstance(line.record.get(name), dict) for name in ("query", "pos")):
            hint = "pandas writes one row a line with orient='records', lines=True"
            line.faults.append(f"found a column as an object, expected one row a line; {hint}")
        if line.origin and (fault := columns.label_fault(names)) is not None:
            line.faults.append(fault)
    return line


def data_files(entries: Sequence[str]) -> list[DataFile]:
    """The files and data sets that ``train_data`` names; of a folder its files in order of names. What a folder holds
    besides brings a warning.

    Raises:
        UserError: an entry does not exist, has an unknown setting, or a folder holds no training data.
    """
    return [file for entry in entries for file in _files_of(entry)]


def entry_path(entry: str) -> Path:
    """The file or folder of an entry, without its settings; of the hub, a name."""
    return Path(_parse(entry)[0])


def _parse(entry: str) -> tuple[str, dict[str, str]]:
    """Path and settings of an entry."""
    path, *rest = str(entry).split(",")
    if not rest or Path(entry).exists() or not all("=" in word for word in rest):
        return str(entry), {}
    settings = dict(word.split("=", 1) for word in rest)
    for name, value in settings.items():
        if name not in _SETTINGS:
            raise UserError(f"{entry}: unknown setting '{name}'{nearest(name, _SETTINGS, '')}")
        if not value:
            raise UserError(f"{entry}: the setting '{name}' has no value")
    if settings.get("header", "true") not in ("true", "false"):
        raise UserError(f"{entry}: found header={settings['header']}, expected true or false")
    if any(name in settings for name in _TABLES):
        if others := [name for name in settings if name not in _TABLES]:
            raise UserError(
                f"{entry}: '{others[0]}' has no effect where lines have ids (queries=, corpus=); leave it out"
            )
        if missing := [name for name in _TABLES if name not in settings]:
            raise UserError(
                f"{entry}: found no {missing[0]}=FILE, expected a table of texts for queries and for corpus"
            )
        for name in _TABLES:
            if not Path(settings[name]).is_file():
                raise UserError(
                    f"{at(settings[name])}: {no_such('file', settings[name])} of lines of an id, a tab and a text ({name}=)"
                )
    return path, settings


def _files_of(entry: str) -> list[DataFile]:
    name, settings = _parse(entry)
    path = Path(name)
    if name.startswith(HUB):
        if name == HUB:
            raise UserError(f"train_data: found no name of a data set after {HUB}")
        return [DataFile(str(entry), name, settings)]
    if not path.exists():
        of_the_hub = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and Path(name).suffix not in _ENDINGS
        hint = f"; a data set of the hub is {HUB}{name}" if of_the_hub else ""
        raise UserError(f"{at(path)}: no such file or folder, expected training data (train_data){hint}")
    split = settings.pop("split", None)
    if path.is_dir() and (path / "dataset_dict.json").is_file():
        path = _split_of(path, split)
    elif split is not None and (not path.is_dir() or split != _saved_split(path)):
        fault = f"found split={split}, which is for {HUB}NAME, and folders of several splits"
        if path.is_dir():
            fault += f"; this folder is one data set{f' (of {known})' if (known := _saved_split(path)) else ''}, leave it out"
        raise UserError(f"{entry}: {fault}")
    if path.suffix.lower() in _SPREADSHEETS:
        raise UserError(f"{at(path)}: a spreadsheet, expected a table as text; save it as 'CSV UTF-8'")
    if not path.is_dir():
        return [DataFile(str(path), str(path), settings)]
    _refuse_collections(path)
    found, left_out = _data_of_folder(path)
    if left_out:
        shown = ", ".join(left_out[:10]) + (f" and {len(left_out) - 10:,} more" if len(left_out) > 10 else "")
        warnings.warn(f"{path}: left out of the training data: {shown}", stacklevel=2)
    if not found:
        known = ", ".join(_ENDINGS)
        inside = next(
            (f for f in sorted(path.glob("*/*")) if Path(plain_name(f)).suffix in _ENDINGS and f.is_file()), None
        )
        hint = "" if inside is None else f"; folders within it are not read, name {inside.parent}"
        raise UserError(f"{at(path)}: the folder holds no training data, expected files that end in {known}{hint}")
    return [DataFile(str(file), str(file), settings) for file in found]


def _refuse_collections(folder: Path) -> None:
    """Say what reads a folder that holds a collection, or one in BEIR's layout: its files are no training data."""
    names = {plain_name(path) for path in folder.iterdir()}
    if "corpus.jsonl" in names and "queries.jsonl" in names:
        read_by = f"prepare --beir {folder} makes a collection of it, of which mine makes training data"
        raise UserError(f"{at(folder)}: a folder in BEIR's layout, expected training data; {read_by}")
    inside = next((path for path in sorted(folder.glob("*/corpus.jsonl"))), None)
    root, language = (folder, inside.parent.name) if inside is not None else (folder.parent, folder.name)
    if inside is not None or ("corpus.jsonl" in names and any(name.endswith("_queries.jsonl") for name in names)):
        named = f"--collection {root} --language {language}"
        read_by = f"mine {named} makes training data of it, or convert --to jsonl {named} from its judgements alone"
        raise UserError(f"{at(folder)}: a collection, expected training data; {read_by}")


def _saved_split(folder: Path) -> str | None:
    """Which split a folder of ``datasets`` holds, if it says so."""
    state = folder / "state.json"
    return read_json(state, dict).get("_split") if state.is_file() else None


def _split_of(folder: Path, split: str | None) -> Path:
    """The folder of one split of a ``DatasetDict``."""
    known = read_json(folder / "dataset_dict.json", dict).get("splits", [])
    split = split or "train"
    if split not in known or not (folder / split).is_dir():
        raise UserError(f"{at(folder)}: no split '{split}'; it has {', '.join(known)}: set {folder},split=NAME")
    if others := [name for name in known if name != split]:
        warnings.warn(f"{folder}: left out of the training data: split {', '.join(others)}", stacklevel=3)
    return folder / split


def _data_of_folder(folder: Path) -> tuple[list[Path], list[str]]:
    """The files with training data, and the names of all other things in the folder."""
    state = folder / "state.json"
    named = None
    if state.is_file() and (data := read_json(state, dict).get("_data_files")):  # as `datasets` saves it
        named = {one["filename"] for one in data}
        if missing := sorted(name for name in named if not (folder / name).is_file()):
            raise UserError(f"{at(folder / missing[0])}: no such file, which {state.name} names")
    found, left_out = [], []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name.startswith("."):  # of git, say, or of a command that writes a file there
            continue
        is_data = path.is_file() and Path(plain_name(path)).suffix in _ENDINGS and path.name not in _NO_DATA
        if is_data and not path.name.startswith(".") and (named is None or path.name in named):
            found.append(path)
        else:
            left_out.append(f"{path.name}/" if path.is_dir() else path.name)
    return found, left_out
