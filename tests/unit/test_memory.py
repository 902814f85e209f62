"""Freed memory is used again, measured by the pages the kernel had to fill."""

import platform
import subprocess
import sys

import pytest

BLOCK, BLOCKS, TIMES, PAGE = 4 * 1024 * 1024, 6, 50, 4096
PROGRAM = f"""
import resource, sys
from worker.memory import keep_freed

if sys.argv[1:] == ["keep"]:
    keep_freed()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({TIMES}):
    blocks = [b"x" * {BLOCK} for _ in range({BLOCKS})]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages_filled(*arguments: str) -> int:
    command = [sys.executable, "-c", PROGRAM, *arguments]
    return int(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is meant")
def test_freed_memory_is_used_again() -> None:
    once = BLOCKS * BLOCK // PAGE
    assert pages_filled() > TIMES / 2 * once
    assert pages_filled("keep") < 3 * once
