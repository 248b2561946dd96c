"""Locks on open files, held by the operating system: they end with the process, however that ends.

The package ``filelock`` would do for keeping others out. It does not say who holds a lock, and a forked worker that outlives
its parent keeps it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_FAR = 1 << 30  # Windows keeps others from reading the bytes that are locked: one far behind the content

_TRIES = 100

_held: set[int] = set()  # open locks of this process


def try_lock(descriptor: int, *, shared: bool = False) -> bool | None:
    """Lock an open file, to which one may write, without waiting; ``shared``, where there is such a lock, with others that do.

    Returns:
        False where another process, or another opening of the file, has the lock; None where there is no locking, as on
        some network file systems.
    """
    if sys.platform == "win32":
        import msvcrt

        os.lseek(descriptor, _FAR, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)
        return True
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


class FileLock:
    """A lock that a file stands for, with the name of its holder inside.

    Where there is no locking, the holder counts as alive if it is on another host or its process runs.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._descriptor: int | None = None

    def take(self) -> bool:
        """Take the lock; False where another process has it."""
        tries = 0
        while self._descriptor is None:
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:  # its holder removes it just now
                if (tries := tries + 1) == _TRIES:
                    raise
                continue
            locked = try_lock(descriptor)
            if locked is None:
                locked = not is_alive(self.holder())
            if not locked:
                os.close(descriptor)
                return False
            try:
                if os.path.samestat(os.fstat(descriptor), self.file.stat()):
                    self._descriptor = descriptor
            except FileNotFoundError:
                pass
            if self._descriptor is None:  # opened before its holder removed it: a lock of nothing
                os.close(descriptor)
        _held.add(self._descriptor)
        try:
            os.lseek(self._descriptor, 0, os.SEEK_SET)
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, json.dumps(this_process()).encode())
        except OSError:
            self.release()
            raise
        return True

    def taken(self) -> bool:
        """Whether another living process has the lock, as far as a look shows. Nothing is taken or written."""
        if not is_alive(self.holder()):  # so that nobody's lock is touched who takes it just now
            return False
        try:
            descriptor = os.open(self.file, os.O_RDWR)
        except OSError:
            return False
        try:
            return not try_lock(descriptor, shared=True)
        finally:
            os.close(descriptor)

    def holder(self) -> dict[str, Any]:
        """Host, process and start of who has the lock or had it last; empty where that is not known."""
        try:
            found = json.loads(self.file.read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def release(self, *, keep: bool = False) -> None:
        """Let the lock go and remove its file, unless it is to be kept."""
        if self._descriptor is None:
            return
        if not keep and sys.platform != "win32":  # before another process can take it
            self.file.unlink(missing_ok=True)
        os.close(self._descriptor)
        _held.discard(self._descriptor)
        self._descriptor = None
        if not keep and sys.platform == "win32":  # which removes no open file
            with contextlib.suppress(OSError):
                self.file.unlink()


def this_process() -> dict[str, Any]:
    """How a holder is named: host, process, and since when."""
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": since}


def is_alive(holder: dict[str, Any]) -> bool:
    """Whether a holder's process may be alive: it runs on this host, or is on another one."""
    if not holder or holder.get("host") != socket.gethostname():
        return bool(holder)
    pid = holder.get("pid")
    if not isinstance(pid, int) or pid <= 0 or pid == os.getpid() or sys.platform == "win32":
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


def _forget() -> None:
    """Close the locks that a forked child has of its parent: a worker must not keep what its dead parent held."""
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
