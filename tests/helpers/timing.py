"""How long a command takes."""

from __future__ import annotations

import resource
import subprocess


def processor_time(*command: str) -> tuple[float, str]:
    """The seconds of processor time of ``command``, which do not count what a busy machine lets it wait, and what it prints."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout
