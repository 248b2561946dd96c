import os
import platform
import subprocess
import sys

import pytest

from clpl_moe.common.allocator import keep_freed_memory

COUNT = """
import ctypes, resource, sys
from clpl_moe.common.allocator import keep_freed_memory

kept = keep_freed_memory() if sys.argv[1] == "kept" else None
libc = ctypes.CDLL(None)
libc.prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: 80 MB are 40 huge pages, which some systems give unasked
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
def work():
    buffer = libc.malloc(80_000_000)
    ctypes.memset(buffer, 1, 80_000_000)
    libc.free(buffer)
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


RELEASE = """
import ctypes
from clpl_moe.common.allocator import keep_freed_memory, release_freed_memory

def resident():
    return int(open("/proc/self/status").read().split("VmRSS:")[1].split()[0])

assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
buffers = [libc.malloc(1_000_000) for _ in range(100)]
for buffer in buffers:
    ctypes.memset(buffer, 1, 1_000_000)
for buffer in buffers[::2]:  # the others hold their places
    libc.free(buffer)
before = resident()
release_freed_memory()
print(before - resident())
"""

on_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")


@on_glibc
def test_gaps_between_buffers_are_given_back(monkeypatch):
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    done = subprocess.run([sys.executable, "-c", RELEASE], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 40_000  # KiB, of 50,000


@on_glibc
def test_freed_buffers_are_used_again(monkeypatch):
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)

    def faults(how):
        done = subprocess.run([sys.executable, "-c", COUNT, how], capture_output=True, text=True, check=True)
        kept, count = done.stdout.split()
        return kept, int(count)

    kept, count = faults("kept")
    assert kept == "True"
    assert count < 100 < faults("default")[1]


def test_environment_takes_precedence(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    assert keep_freed_memory() is False
