"""Reading files that may be compressed, by the end of their names: ``.gz``, and ``.zst`` where a library for it is there."""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from clpl_moe.common.errors import UserError, at

SUFFIXES = (".gz", ".zst")
_GIT_LFS = b"version https://git-lfs"  # what stands in place of a large file that was not fetched


def plain_name(path: str | Path) -> str:
    """A file's name in lower case, without the suffix of its compression.

    >>> plain_name("data/Train.JSONL.gz")
    'train.jsonl'
    """
    name = Path(path).name.lower()
    return next((name.removesuffix(end) for end in SUFFIXES if name.endswith(end)), name)


@contextlib.contextmanager
def open_bytes(path: str | Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The content of a file, and the file itself, whose position tells how much of it has been read.

    Raises:
        UserError: there is no such file, it cannot be read, is damaged or cut short.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{at(path)}: no such file" if not path.exists() else f"{at(path)}: not a file")
    try:
        raw = path.open("rb")
    except OSError as error:
        raise UserError(f"{at(path)}: cannot be read ({error.strerror})") from None
    with raw:
        if raw.read(len(_GIT_LFS)) == _GIT_LFS:
            raise UserError(f"{at(path)}: found Git LFS's pointer to the file, not the file; run `git lfs pull` there")
        raw.seek(0)
        ending = path.suffix.lower()
        if ending == ".gz":
            content: Any = gzip.GzipFile(fileobj=raw)
        elif ending == ".zst":
            if (library := _zstandard()) is None:
                fault = "reading .zst needs a library: pip install zstandard; or decompress the file"
                raise UserError(f"{at(path)}: {fault}")
            content = library[0](raw)
        else:
            content = raw
        with naming_damage(path):
            yield content, raw


@contextlib.contextmanager
def naming_damage(path: str | Path, line: Callable[[], int] | None = None) -> Iterator[None]:
    """Turn what a decompressor raises into a :class:`UserError` with the file, and with the ``line`` that it got to."""
    library = _zstandard()
    errors = (gzip.BadGzipFile, zlib.error, *(() if library is None else library[1:]))
    try:
        yield
    except EOFError:
        place = at(path, None if line is None else line())
        raise UserError(f"{place}: the file ends too early, it was cut short; fetch this file again") from None
    except errors as error:
        place, kind = at(path, None if line is None else line()), "zst" if str(path).endswith(".zst") else "gzip"
        raise UserError(f"{place}: broken {kind} ({error}); fetch this file again") from None


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
