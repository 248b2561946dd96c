"""What figures were measured on: every result that a command writes says so."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from pathlib import Path

_PACKAGES = ("torch", "transformers", "FlagEmbedding", "sentence-transformers", "accelerate")


def machine() -> dict[str, object]:
    """Processor, cores, GPU, and the versions of Python and torch."""
    import torch

    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    half = [name for name in ("avx512_bf16", "amx_bf16") if features.get(name)]  # fast bfloat16, and how
    return {
        "processor": cpu_field("model name") or platform.processor(),
        "cores": os.cpu_count(),
        "instructions": ", ".join([torch.backends.cpu.get_cpu_capability(), *half]),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def cpu_field(name: str) -> str | None:
    """What Linux says of the first processor under ``name``, such as ``"vendor_id"``; None where it says nothing."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), None)


def usable_cores() -> int:
    """How many cores this process may use."""
    # Linux knows; macOS has no such limits.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Versions of the packages that the figures depend on, as far as they are installed."""
    installed = {distribution.name for distribution in importlib.metadata.distributions()}
    return {name: importlib.metadata.version(name) for name in _PACKAGES if name in installed}


def peak_memory(device: str) -> int:
    """Highest number of bytes so far: allocated on a GPU; on a CPU resident, of this process."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource  # there is none on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def without_folders(words: list[str]) -> list[str]:
    """A command line without absolute paths: folders of other machines tell nothing."""
    return [re.sub(r"^((?:--\w+=)?)/(?:.*/)?(?=[^/])", r"\1", word) for word in words]
