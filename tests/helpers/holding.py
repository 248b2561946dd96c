"""Another process that writes an output."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

_HOLD = """
import sys, time
from clpl_moe.common.output import writing

with writing(sys.argv[1], inside=sys.argv[2] == "True"):
    print("ready", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def held(path: Path, *, inside: bool = False) -> Iterator[subprocess.Popen]:
    """A process has the output until the block ends, and is killed then."""
    command = [sys.executable, "-c", _HOLD, str(path), str(inside)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()
