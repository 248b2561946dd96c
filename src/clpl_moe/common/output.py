"""An output while a command writes it: one process at a time, and a place for all that is unfinished.

1. As long as an output is written, a *work folder* lies beside it, or in it where the output is a folder that is filled in
   place. The file ``lock`` in it says who writes, and keeps others out (:mod:`clpl_moe.common.lock`).
2. A folder that is to be replaced is made in the work folder. The old one moves there, the new one takes its place, the old
   one is removed.
3. Embeddings lie in the work folder, too. They outlive an interruption, and the next run goes on from them.
4. Whoever has the lock knows that all it finds is of a dead process: a folder that was being replaced goes back to its place,
   and files go that the dead process has not finished.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from clpl_moe.common.errors import OptionError, UserError, at
from clpl_moe.common.files import naming_a_full_disk, refuse_unwritable, resolved
from clpl_moe.common.lock import FileLock

# A name that the upload of a run folder (transformers) and patterns such as */metrics.json pass over.
WORK_FOLDER = "_clpl_moe"

_LOCK, _UNFINISHED, _NEW, _OLD = "lock", "unfinished", "new", "old"


_NAMED_WITHIN = 0.5  # seconds after taking a lock


class Output:
    """An output, which between :func:`writing` and its end this process alone may write.

    Attributes:
        path: the file or folder.
        work: the work folder.
        first: whether this is the first of the processes that ``torchrun`` started; the others write nothing but embeddings.
    """

    def __init__(self, path: str | Path, *, inside: bool = False, first: bool = True) -> None:
        if str(path) == "":
            raise OptionError("output", "found an empty name, expected a file or folder")
        self.path = path = Path(path).absolute()  # of "." and of "" there is no parent
        self.first = first
        self.work = resolved(path) / WORK_FOLDER if inside else resolved(path.parent) / f".{path.name}.clpl_moe"
        self.embeddings = self.work / "embeddings"

    @contextlib.contextmanager
    def unfinished(self, *paths: Path) -> Iterator[None]:
        """Until the block ends well, these files are unfinished: should this process die, the next one removes them."""
        known, folder = self.work / _UNFINISHED, self.path if self.work.name == WORK_FOLDER else self.path.parent
        with naming_a_full_disk(known), known.open("w", encoding="utf-8") as file:
            # The next process may come by another path, or find the folder in another place.
            json.dump([os.path.relpath(path.absolute(), folder) for path in paths], file)
        yield
        known.unlink()

    @contextlib.contextmanager
    def replacement(self) -> Iterator[Path]:
        """A folder that takes the place of the output when the block ends well; until then that is untouched."""
        new, old = self.work / _NEW, self.work / _OLD
        new.mkdir()
        try:
            with naming_a_full_disk(self.path):
                yield new
            if os.path.lexists(self.path):
                self.path.rename(old)
            new.rename(self.path)
        finally:
            self.recover()

    @contextlib.contextmanager
    def additions(self, folder: Path) -> Iterator[Path]:
        """A folder whose files move into one of the output when the block ends well, each in place of one of its name."""
        new = self.work / _NEW
        new.mkdir()
        try:
            yield new
            for path in [path for path in new.rglob("*") if path.is_file()]:
                target = folder / path.relative_to(new)
                target.parent.mkdir(exist_ok=True)
                path.replace(target)
        finally:
            _remove(new)

    def recover(self) -> None:
        """Put a folder back that was being replaced; remove what was to come, or has gone, in its place, and what is
        unfinished."""
        old = self.work / _OLD
        if os.path.lexists(old) and not os.path.lexists(self.path):
            old.rename(self.path)
        _remove(old)
        _remove(self.work / _NEW)
        with contextlib.suppress(FileNotFoundError, ValueError):  # killed before the list was whole: nothing had begun
            for path in map(Path, json.loads((self.work / _UNFINISHED).read_bytes())):
                if ".." not in path.parts and not path.is_absolute():  # whoever made the folder
                    (self.work.parent / path).unlink(missing_ok=True)
        _remove(self.work / _UNFINISHED)

    def clear(self, error: BaseException | None) -> bool:
        """Remove from the work folder what no next run needs; returns whether it is empty but for the lock."""
        # After a mistake the same command would end the same way; after an interruption it goes on from them.
        if error is None or isinstance(error, UserError):
            _remove(self.embeddings)
        return [path.name for path in self.work.iterdir()] == [_LOCK]


_lock = threading.Lock()
_open: dict[Path, tuple[Output, int]] = {}  # by work folder, with the thread


@contextlib.contextmanager
def writing(path: str | Path, *, inside: bool = False) -> Iterator[Output]:
    """Keep an output to this process until the block ends. A block within, of the same thread, gets the same output.

    Args:
        path: a file, or a folder that is replaced as a whole.
        inside: the output is a folder that is filled in place. Other processes may see it under another path, such as a
            volume of several containers; so the lock lies inside.

    Raises:
        UserError: another process writes it, or it cannot be written.
    """
    output = Output(path, inside=inside, first=is_first_process())
    path, work = output.path, output.work
    if not output.first:
        yield output
        return
    with _lock:
        known = _open.get(work)
    if known is not None:
        if known[1] != threading.get_ident():
            raise UserError(f"{at(path)}: another thread of this process writes this output; name another")
        yield known[0]
        return
    if inside and path.exists() and not path.is_dir():
        raise UserError(f"{at(path)}: a file is in the way of the output folder; name another")
    refuse_unwritable(path / WORK_FOLDER if inside else path)
    with contextlib.suppress(FileNotFoundError):  # its holder removes it just now
        if work.exists() and not (work / _LOCK).exists() and any(work.iterdir()):
            raise UserError(f"{at(work)}: found another folder where one for unfinished work is to be; rename it")
    missing = [folder for folder in work.parents if not folder.exists()]
    lock, error, held, empty = FileLock(work / _LOCK), None, False, False
    try:
        try:
            held = lock.take()
        except OSError as fault:
            raise UserError(f"{at(lock.file)}: cannot be written ({fault.strerror})") from None
        if not held:
            raise UserError(f"{at(path)}: {_taken(lock)}")
        with _lock:
            _open[work] = output, threading.get_ident()
        output.recover()
        yield output
    except BaseException as raised:
        error = raised
        raise
    finally:
        if held:
            with _lock:
                _open.pop(work, None)
            try:
                empty = output.clear(error)
            finally:
                lock.release(keep=not empty)
        # Others may have come for the lock meanwhile, or put something into the folders.
        for folder in (work, *(missing if error is not None else ())):
            with contextlib.suppress(OSError):
                folder.rmdir()


def refuse_taken(path: str | Path, *, inside: bool = False) -> None:
    """Raise :class:`UserError` where another process writes an output. A look before a command loads much: what it needs is
    free, :func:`writing` decides."""
    output = Output(path, inside=inside)
    if is_first_process() and (lock := FileLock(output.work / _LOCK)).taken():
        raise UserError(f"{at(output.path)}: {_taken(lock)}")


@contextlib.contextmanager
def atomic_dir(path: str | Path) -> Iterator[Path]:
    """A folder that is filled under a temporary name and takes the place of ``path`` when the block ends well."""
    with writing(path) as output, output.replacement() as folder:
        yield folder


def _taken(lock: FileLock) -> str:
    until = time.monotonic() + _NAMED_WITHIN
    while not (holder := lock.holder()) and time.monotonic() < until:
        time.sleep(0.01)  # it has the lock, and writes its name just now
    if not holder.keys() >= {"host", "pid", "since"}:
        return "another process writes this output; wait for it to end, or name another output"
    host = holder["host"]
    who = f"process {holder['pid']} on {host} writes this output since {holder['since']}"
    hint = "" if host == socket.gethostname() else f"; if that one is dead, remove {lock.file}"
    return f"{who}; wait for it to end, or name another output{hint}"


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_first_process() -> bool:
    """Whether this process, of those that ``torchrun`` started, is the one that writes."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank() == 0
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"
