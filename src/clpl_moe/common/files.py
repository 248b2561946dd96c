"""Reading JSONL with the place of each fault, and writing so that nothing is half-written or overwritten unasked."""

from __future__ import annotations

import base64
import codecs
import contextlib
import errno
import fnmatch
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import IO, Any, Literal
from uuid import UUID

from clpl_moe.common.compressed import naming_damage, open_bytes, refuse_no_file
from clpl_moe.common.errors import UserError, at
from clpl_moe.common.lock import try_lock


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number (from 1) and object of each line that is not blank.

    Raises:
        UserError: the file is missing, empty or unreadable, a line is not UTF-8, not JSON or not an object.
    """
    for number, _, raw in read_lines(path):
        yield number, parse_line(path, number, raw)


def read_lines(
    path: str | Path, may_be_empty: bool = False, expected: str = "one JSON object a line"
) -> Iterator[tuple[int, int, bytes]]:
    """Line number (from 1), the byte where it begins, and bytes of each line that is not blank, of a file that has some.

    The message about a file without any says what was ``expected``. A compressed file (:mod:`clpl_moe.common.compressed`) is
    decompressed.
    """
    empty, start, number = True, 0, 0
    with open_bytes(path) as (file, _), naming_damage(path, lambda: number + 1):
        for number, raw in enumerate(file, 1):
            if not is_blank(raw):
                empty = False
                yield number, start, raw
            start += len(raw)
    if empty and not may_be_empty:
        raise UserError(f"{at(path)}: the file is empty, expected {expected}")


def is_blank(raw: bytes) -> bool:
    """Whether a line of a text file says nothing: white space, or the byte-order mark alone."""
    return raw.strip() in (b"", codecs.BOM_UTF8)


def parse_line(path: str | Path, number: int, raw: bytes) -> dict[str, Any]:
    """One line of a JSONL file as an object; raises :class:`UserError` with file and line otherwise."""
    record, faults = inspect_line(raw)
    if record is None or faults:
        raise UserError(f"{at(path, number)}: {faults[0]}")
    return record


def inspect_line(raw: bytes) -> tuple[dict[str, Any] | None, list[str]]:
    """One line of a JSONL file as an object, as far as it can be read, and all that is wrong with it as JSON."""
    twice: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # JSON takes the last of two equal keys, and so would drop data without a word.
        record = dict(pairs)
        if len(record) < len(pairs):
            names = [name for name, _ in pairs]
            twice.extend(name for name in record if names.count(name) > 1)
        return record

    try:
        record = parse_json(raw, object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        return None, [f"not UTF-8 text ({error.reason})"]
    except ValueError as error:
        return None, [f"not JSON ({json_fault(error)}), expected one object a line"]
    if not isinstance(record, dict):
        return None, [f"found {type(record).__name__}, expected a JSON object"]
    faults = [f"not JSON ({name!r} stands twice), expected one object a line" for name in twice]
    if has_lone_surrogates(record, raw):
        faults.append(LONE_SURROGATE)
    return record, faults


def parse_json(raw: bytes, **how: Any) -> Any:
    """The value of a JSON text, by ``json.loads`` with ``how``; a byte-order mark may stand in front.

    Raises :class:`UnicodeDecodeError` where the text is not UTF-8, another :class:`ValueError` (:func:`json_fault`) where it
    is not JSON or nested too deeply.
    """
    # Some editors write the mark, which is no part of the text; files that are joined have one in the middle.
    text = raw.decode("utf-8-sig")
    try:
        value = json.loads(text, **how)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if raw.count(b"[") + raw.count(b"{") > _DEEPEST and _nested_too_deeply(value):
        raise ValueError(_TOO_DEEP)
    return value


def json_fault(error: ValueError) -> str:
    """In a few words, why a text is not taken for JSON."""
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return "a number of thousands of digits" if "digits" in str(error) else str(error)


_TOO_DEEP = "nested too deeply"
# Without a limit of our own, what can be read would depend on how deep in the program it is read.
_DEEPEST = 100


def _nested_too_deeply(value: Any) -> bool:
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(_DEEPEST):
        inner = [i for v in level for i in (v.values() if isinstance(v, dict) else v)]
        level = [i for i in inner if isinstance(i, (dict, list))]
        if not level:
            return False
    return True


LONE_SURROGATE = "holds half of a surrogate pair (an escape \\ud800 to \\udfff)"


def has_lone_surrogates(value: Any, raw: bytes) -> bool:
    """Whether JSON holds half a surrogate pair: no tokenizer or file takes such a text."""
    if b"\\ud" not in raw and b"\\uD" not in raw:  # they come in as escapes only
        return False
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def refuse_existing(path: str | Path, overwrite: bool = False, *, files: Sequence[str] = ()) -> None:
    """Raise :class:`UserError` if an output is in the way and may not be replaced, or could not be written.

    Where the output is a folder, ``files`` are the names of what the command writes into it, with wildcards; first the one
    that each such folder has. Another folder, or one that holds anything else, is not replaced, even if asked: a slip of
    the pen would delete anything.
    """
    path = Path(path)
    refuse_unwritable(path)
    if not os.path.lexists(path) or (files and path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        kind = "folder is not empty" if path.is_dir() else "file exists" if path.exists() else "is a link to nothing"
        raise UserError(f"{at(path)}: the output {kind}; name another, or set overwrite to replace it")
    expected = f"a folder with {files[0]}" if files else "a file"
    if not path.is_dir():
        if files:
            raise UserError(f"{at(path)}: found a file, expected {expected} to replace; name another")
        return
    if not files or not (path / files[0]).is_file():
        raise UserError(f"{at(path)}: found a folder with other things, expected {expected} to replace; name another")
    for found in sorted(path.iterdir()):
        if not any(fnmatch.fnmatchcase(found.name, name) for name in files):
            raise UserError(
                f"{at(found)}: not written by this command, and would go with the folder; move it elsewhere"
            )


def resolved(path: str | os.PathLike[str]) -> Path:
    """A path without links. At a link within itself ``Path.resolve`` raises an error, in some versions of Python."""
    return Path(os.path.realpath(path))


def refuse_input(path: str | Path, inputs: Iterable[str | os.PathLike[str]]) -> None:
    """Raise :class:`UserError` where an output, which may be replaced, is a file that the command reads."""
    if resolved(Path(path).parent) / Path(path).name in (resolved(read) for read in inputs):
        raise UserError(f"{at(path)}: this command reads the file; name another output")


def refuse_unwritable(path: str | Path) -> None:
    """Raise :class:`UserError` where nothing can be written at ``path``: said before the work, not after it."""
    path = Path(path).absolute()
    there = next(parent for parent in path.parents if os.path.lexists(parent))
    for name in (*path.relative_to(there).parts, f".{path.name}.12345678.tmp"):  # the last while it is unfinished
        try:
            (there / name).lstat()
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise UserError(f"{at(path)}: cannot be written ({error.strerror})") from None
    if not there.is_dir():
        raise UserError(f"{at(path)}: cannot be written, {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{at(path)}: cannot be written, the folder {there} is read-only")


_FULL = 2**20  # bytes that are free on a disk that counts as full: a write that failed leaves less than a block


@contextlib.contextmanager
def atomic_open(path: str | Path, mode: Literal["w", "wb"] = "w") -> Iterator[IO[Any]]:
    """A file that gets its name only when the block ends well; until then ``path`` is untouched. Text is UTF-8."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_unfinished(path)
    handle, temporary = _make_temporary(path)
    try:
        with naming_a_full_disk(path), os.fdopen(handle, mode, encoding="utf-8" if mode == "w" else None) as file:
            yield file
            file.flush()
            temporary.chmod(0o666 & ~_umask())
            if sys.platform != "win32":  # which renames no open file
                temporary.replace(path)
        if sys.platform == "win32":
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def naming_a_full_disk(path: str | Path) -> Iterator[None]:
    """Let what a full disk brings about be an :class:`OSError` that says so, and says where: torch, numpy and safetensors
    have words and classes of their own, and a write knows no name."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = error.filename or str(path)
            raise
        there = next(folder for folder in Path(path).absolute().parents if folder.is_dir())
        if shutil.disk_usage(there).free < _FULL:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


def _make_temporary(path: Path) -> tuple[int, Path]:
    """A file that is to become ``path``. It is locked while it is open: an unlocked one is of a dead process."""
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        temporary = Path(name)
        if try_lock(handle) is not False and temporary.exists():
            return handle, temporary
        os.close(handle)  # another process that writes this file was faster, and took it for unfinished


def _remove_unfinished(path: Path) -> None:
    """Remove what processes that were killed have left of :func:`atomic_open` for this path."""
    ours = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}\.tmp")
    for file in [file for file in path.parent.iterdir() if ours.fullmatch(file.name)]:
        with contextlib.suppress(OSError):
            handle = os.open(file, os.O_RDWR)
            dead = try_lock(handle)
            os.close(handle)
            if dead:
                file.unlink()


def share(path: str | Path) -> None:
    """Give a file the permissions that the umask leaves it: safetensors keeps its files to their owner."""
    Path(path).chmod(0o666 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_jsonl(path: str | Path, records: Iterable[dict[str, Any]]) -> None:
    """Write one object a line, UTF-8, whole or not at all. Values of tables that JSON has no form for become texts."""
    with atomic_open(path) as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False, default=_as_text) + "\n")


def _as_text(value: Any) -> str:
    """A date, a time, a decimal number; bytes, such as a picture's, in base64."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, date | time | timedelta | Decimal | UUID):
        return str(value)
    raise TypeError(f"a {type(value).__name__} cannot be written as JSON")


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON, whole or not at all."""
    with atomic_open(path) as file:
        file.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def read_json(path: str | Path, kind: type) -> Any:
    """The value of a JSON file; :class:`UserError` where it is no file, not JSON, no ``kind``, or text that no file can hold."""
    refuse_no_file(path)
    raw = Path(path).read_bytes()
    try:
        value = parse_json(raw)
    except ValueError as error:  # of JSON or of UTF-8
        raise UserError(f"{at(path)}: not JSON ({json_fault(error)})") from None
    if not isinstance(value, kind):
        raise UserError(f"{at(path)}: found a {type(value).__name__}, expected a {kind.__name__}")
    if has_lone_surrogates(value, raw):
        raise UserError(f"{at(path)}: {LONE_SURROGATE}")
    return value


def find_json(path: str | Path) -> dict[str, Any] | None:
    """The object that a JSON file holds; None where there is none."""
    try:
        return read_json(path, dict)
    except (OSError, UserError):
        return None


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a finite number."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def are_numbers(value: Any, names: Iterable[str] = ()) -> bool:
    """Whether a value of JSON is a mapping of names to such numbers, with ``names`` among them."""
    return isinstance(value, dict) and value.keys() >= set(names) and all(map(is_number, value.values()))


def is_text(value: Any) -> bool:
    """Whether a value of JSON is a text that can be written and be a part of a path."""
    return isinstance(value, str) and "\0" not in value and not any("\ud800" <= c <= "\udfff" for c in value)


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits; raises :class:`UserError` where it cannot be read."""
    digest = hashlib.sha256()
    refuse_no_file(path)
    try:
        with Path(path).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{at(path)}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()
