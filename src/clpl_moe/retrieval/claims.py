"""Which process does which part of a job, without a process that hands the parts out.

1. Who makes the file of a claim has the part. That only one process can make a file is what shared file systems promise, too,
   where locks are often missing.
2. As long as the claim stands, a thread touches the file.
3. A claim whose process on this machine is dead, or that nobody has touched for :data:`STALE` seconds by the watch of who wants
   it, is taken over. The clocks of two machines are never compared.

That a claim is taken over from a living process (one that was stopped for minutes) must do no harm: the results of a part are
equal, whoever makes them, and get their name when they are whole. So it only costs time.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from pathlib import Path

from clpl_moe.common.lock import FileLock, is_alive, this_process

BEAT = 15.0  # seconds between two touches
STALE = 180.0  # a network file system may show a change after a minute


class Claims:
    """The claims of this process on the parts of a job, files in a folder; those that it has left go at the end of the block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._own: set[int] = set()
        self._seen: dict[
            int, tuple[int, float]
        ] = {}  # of others' claims: last touch, and when this process first saw it
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._touch, daemon=True)

    def __enter__(self) -> Claims:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        for number in list(self._own):
            self.release(number)

    def file(self, number: int) -> Path:
        """The file of a claim."""
        return self.folder / f"{number:06d}.claim"

    def take(self, number: int) -> bool:
        """Claim a part; False where another process has it, or this one."""
        if number in self._own:
            return False
        if (touched := self._stale(number)) is not None:
            # One process alone can move it away; another one may make the next claim at once.
            away = self.file(number).with_suffix(f".{socket.gethostname()}-{os.getpid()}")
            with contextlib.suppress(FileNotFoundError):
                self.file(number).rename(away)
                if away.stat().st_mtime_ns != touched:  # the next claim
                    away.rename(self.file(number))
                    return False
                away.unlink()
        try:
            descriptor = os.open(self.file(number), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            self._own.add(number)
            json.dump(this_process() | {"machine": _machine()}, file)
        return True

    def release(self, number: int) -> None:
        """Give a part back, done or not."""
        self._own.discard(number)
        self.file(number).unlink(missing_ok=True)

    def _stale(self, number: int) -> int | None:
        """When a claim was touched last, in ns, if it is to be taken over."""
        try:
            touched = self.file(number).stat().st_mtime_ns
        except FileNotFoundError:
            return None
        holder = FileLock(self.file(number)).holder()
        # Windows does not say which processes live.
        if holder.get("machine") == _machine() and sys.platform != "win32" and not is_alive(holder):
            return touched
        last, since = self._seen.get(number, (None, 0.0))
        if last == touched:
            return touched if time.monotonic() - since > STALE else None
        self._seen[number] = touched, time.monotonic()
        return None

    def _touch(self) -> None:
        while not self._ended.wait(BEAT):
            for number in list(self._own):
                with contextlib.suppress(OSError):  # taken over, or a file system that is away for a while
                    os.utime(self.file(number))


def _machine() -> str:
    """Within what a process id means one process: many machines are called localhost, and containers number their own."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # Linux has it
        parts += [
            Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            str(Path("/proc/self/ns/pid").readlink()),
        ]
    return " ".join(parts)
