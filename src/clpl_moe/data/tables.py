"""The rows of tables, one at a time: parquet, arrow, CSV and TSV. Each reader gives the names of the columns, and the rows."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterator
from typing import Any

from clpl_moe.common.compressed import AS_UTF8, open_bytes, plain_name, refuse_no_file
from clpl_moe.common.errors import UserError, at, one_line

TEXT_TABLES = (".csv", ".tsv")
_ROWS_AT_ONCE = 1000
_LONGEST_CELL = 2**31 - 1
CELLS = "\0"  # stands in a row for the number of its cells, where it has others than the line of names; pandas writes a column ""

Rows = tuple[list[str], Iterator[dict[str, Any]]]


def parquet_rows(path: str, name: str) -> Rows:
    """A parquet file's."""
    import pyarrow.parquet

    refuse_no_file(path)
    try:
        file = pyarrow.parquet.ParquetFile(path, memory_map=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable(name, "parquet", error) from None
    return file.schema_arrow.names, _rows(name, "parquet", file.iter_batches(_ROWS_AT_ONCE))


def arrow_rows(path: str, name: str) -> Rows:
    """An arrow file's, of either format: of a stream, as ``datasets`` writes it, or of a file."""
    import pyarrow

    refuse_no_file(path)
    try:
        source = pyarrow.memory_map(path)
        try:
            stream = pyarrow.ipc.open_stream(source)
            return stream.schema.names, _rows(name, "arrow", stream)
        except pyarrow.ArrowInvalid:
            file = pyarrow.ipc.open_file(source)
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable(name, "arrow", error) from None
    return file.schema.names, _rows(name, "arrow", map(file.get_batch, range(file.num_record_batches)))


def _rows(name: str, kind: str, batches: Any) -> Iterator[dict[str, Any]]:
    import pyarrow

    try:
        for batch in batches:
            for start in range(0, len(batch), _ROWS_AT_ONCE):
                yield from batch.slice(start, _ROWS_AT_ONCE).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _unreadable(name, kind, error) from None


def _unreadable(name: str, kind: str, error: Exception) -> UserError:
    return UserError(f"{at(name)}: not {kind}, or damaged ({one_line(error)})")


def text_rows(path: str, name: str, *, header: bool = True) -> Rows:
    """A CSV or TSV file's, cells as texts. A row with other cells than the line of names is ``{CELLS: their number}``.

    Without ``header`` columns are query, positive, and negatives, and quotes mean nothing.
    """
    rows = _cells(path, name, quoted=header)
    first = next(rows, None)
    if first is None:
        raise UserError(f"{at(name)}: the file is empty, expected a line with the names of its columns")
    if len(first) > 1 and all(cell.strip().isdecimal() for cell in first):
        hint = f"ids without their texts? name the tables with these: {name.partition(',')[0]},queries=FILE,corpus=FILE"
        raise UserError(f"{at(name, 1)}: found numbers alone, {hint}")
    if header:
        names = [cell.strip() for cell in first]
        if twice := [column for column in names if names.count(column) > 1]:
            raise UserError(f"{at(name, 1)}: the column '{twice[0]}' stands twice")
    else:
        names = ["query", "positive", *(f"negative_{number}" for number in range(1, len(first) - 1))]

    def as_dicts() -> Iterator[dict[str, Any]]:
        if not header:
            yield dict(zip(names, first)) if len(first) == len(names) else {CELLS: len(first)}
        for row in rows:
            yield dict(zip(names, row)) if len(row) == len(names) else {CELLS: len(row)}

    return names, as_dicts()


def _cells(path: str, name: str, quoted: bool) -> Iterator[list[str]]:
    """The cells of each row that is not blank."""
    csv.field_size_limit(_LONGEST_CELL)
    with open_bytes(path) as (content, _):
        text = io.TextIOWrapper(content, encoding="utf-8-sig", newline="")
        try:
            line = text.readline()
            separator = "\t" if plain_name(path).endswith(".tsv") else max(",;\t", key=line.count)
            how: Any = {"delimiter": separator, "strict": True}
            if not quoted:
                how = {"delimiter": separator, "quoting": csv.QUOTE_NONE}

            reader = csv.reader(itertools.chain([line], text), **how)
            for row in reader:
                if row and row[0].startswith("\ufeff"):  # files that were joined
                    row[0] = row[0][1:]
                if any(row):
                    yield row
        except UnicodeDecodeError as error:
            hint = f"{AS_UTF8} iconv -f CP949 -t UTF-8, if a Korean Windows wrote it"
            raise UserError(f"{at(name)}: not UTF-8 text ({error.reason}); {hint}") from None
        except csv.Error as error:
            hint = "a quote that opens a cell has to be closed"
            raise UserError(f"{at(name, reader.line_num)}: broken table ({error}); {hint}") from None
        finally:
            text.detach()
