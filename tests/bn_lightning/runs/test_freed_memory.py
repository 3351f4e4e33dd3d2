"""Freed memory stays in the process."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, resource, sys
from bn_lightning.runs.freed_memory import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p

def steps(count):
    for _ in range(count):
        memory = ctypes.c_void_p(libc.malloc(2**26))  # 64 MB, 16,384 pages
        ctypes.memset(memory, 1, 2**26)
        libc.free(memory)

steps(3)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
steps(10)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 10)
"""


def faults_of_a_step(how: str) -> int:
    """The pages that a step takes from the kernel."""
    command = [sys.executable, "-c", SCRIPT, how]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to")
def test_a_step_takes_the_memory_of_the_last_one():
    assert faults_of_a_step("kept") < 100 < 16_000 < faults_of_a_step("returned")
