"""Reading files that may be compressed, by the end of their names: ``.gz``, and ``.zst`` where a library for it is there."""

from __future__ import annotations

import codecs
import contextlib
import functools
import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from clpl_moe.common.errors import UserError, at

SUFFIXES = (".gz", ".zst")
_GIT_LFS = b"version https://git-lfs"  # what stands in place of a large file that was not fetched
_MARKS = {  # longest first: one of UTF-32 begins with one of UTF-16
    **dict.fromkeys((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), "UTF-32"),
    **dict.fromkeys((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "UTF-16"),
}
AS_UTF8 = "save it as UTF-8 (a spreadsheet: 'CSV UTF-8'), or"  # what to do with text in another encoding


def refuse_pointer(path: str | Path, start: bytes | None = None) -> None:
    """Raise :class:`UserError` where a file, whose ``start`` may be given, is Git LFS's pointer to what was not fetched."""
    if start is None:
        with Path(path).open("rb") as file:
            start = file.read(len(_GIT_LFS))
    if start.startswith(_GIT_LFS):
        raise UserError(f"{at(path)}: found Git LFS's pointer to the file, not the file; run `git lfs pull` there")


def plain_name(path: str | Path) -> str:
    """A file's name in lower case, without the suffix of its compression.

    >>> plain_name("data/Train.JSONL.gz")
    'train.jsonl'
    """
    name = Path(path).name.lower()
    return next((name.removesuffix(end) for end in SUFFIXES if name.endswith(end)), name)


def refuse_no_file(path: str | Path) -> None:
    """Raise :class:`UserError` for what is there and is no file: opening a pipe waits, for ever where nobody writes."""
    if os.path.exists(path) and not os.path.isfile(path):  # noqa: PTH110, PTH113 - names may be too long for Path's
        raise UserError(f"{at(path)}: not a file")


@contextlib.contextmanager
def open_bytes(path: str | Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The content of a file, and the file itself, whose position tells how much of it has been read.

    Raises:
        UserError: there is no such file, it cannot be read, is damaged or cut short.
    """
    path = Path(path)
    refuse_no_file(path)
    if not path.exists():
        raise UserError(f"{at(path)}: no such file")
    try:
        raw = path.open("rb")
    except OSError as error:
        raise UserError(f"{at(path)}: cannot be read ({error.strerror})") from None
    with raw:
        start = raw.read(len(_GIT_LFS))
        refuse_pointer(path, start)
        raw.seek(0)
        content = _decompressed(raw, path)
        if content is not raw:
            with (
                contextlib.suppress(EOFError, *_errors()),
                path.open("rb") as again,
            ):  # the reader finds damage, and says where
                start = _decompressed(again, path).read(4)
        refuse_utf16(path, start)
        with naming_damage(path):
            yield content, raw


def _decompressed(raw: IO[bytes], path: Path) -> Any:
    ending = path.suffix.lower()
    if ending == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if ending == ".zst":
        if (library := _zstandard()) is None:
            fault = "reading .zst needs a library: pip install zstandard; or decompress the file"
            raise UserError(f"{at(path)}: {fault}")
        return library[0](raw)
    return raw


def refuse_utf16(path: str | Path, start: bytes) -> None:
    """Raise :class:`UserError` where a text file begins as UTF-16 or UTF-32, which spreadsheets and shells of Windows write."""
    kind = next((name for mark, name in _MARKS.items() if start.startswith(mark)), None)
    if kind is not None:
        fault = f"not UTF-8 text, but {kind}, as its byte-order mark says; {AS_UTF8} iconv -f {kind} -t UTF-8"
        raise UserError(f"{at(path)}: {fault}")


@contextlib.contextmanager
def naming_damage(path: str | Path, line: Callable[[], int] | None = None) -> Iterator[None]:
    """Turn what a decompressor raises into a :class:`UserError` with the file, and with the ``line`` that it got to."""
    try:
        yield
    except EOFError:
        place = at(path, None if line is None else line())
        raise UserError(f"{place}: the file ends too early, it was cut short; fetch this file again") from None
    except _errors() as error:
        place, kind = at(path, None if line is None else line()), "zst" if str(path).endswith(".zst") else "gzip"
        raise UserError(f"{place}: broken {kind} ({error}); fetch this file again") from None


def _errors() -> tuple[type[Exception], ...]:
    """What decompressors raise where the data are damaged."""
    library = _zstandard()
    return (gzip.BadGzipFile, zlib.error, *(() if library is None else library[1:]))


@functools.cache
def _zstandard() -> tuple[Callable[[IO[bytes]], Any], type[Exception]] | None:
    """What reads Zstandard, and the error that it raises."""
    with contextlib.suppress(ImportError):
        from compression import zstd  # type: ignore[import-not-found, unused-ignore]  # of Python 3.14

        return zstd.ZstdFile, zstd.ZstdError
    with contextlib.suppress(ImportError):
        import zstandard

        def opened(raw: IO[bytes]) -> IO[bytes]:
            reader: Any = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
            return io.BufferedReader(reader)

        return opened, zstandard.ZstdError
    return None
