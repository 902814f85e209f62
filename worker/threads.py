"""What the operating system knows of threads: their names, and how it shares the processor out.

Knows nothing of what the threads do.
"""

import ctypes
import os
import sys
from contextlib import suppress
from threading import current_thread

_PR_SET_NAME = 15  # linux/prctl.h; the kernel keeps 15 bytes


def show_name() -> None:
    """Give the calling thread's Python name to the kernel (Python does so itself from 3.14).

    So `top -H`, profilers and the benchmark show it. Threads it starts, as torch's, inherit it.
    """
    if sys.platform == "linux":
        name = current_thread().name.encode()[:15]
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name, 0, 0, 0)


def interrupt_nobody() -> None:
    """Let the calling thread, when it wakes, wait for who has the processor.

    For what computes all the time: in turns of a millisecond each finds the caches full of
    another's. This is SCHED_BATCH of sched(7), which processes it starts inherit.
    """
    if sys.platform == "linux":
        with suppress(OSError):  # a sandbox may know one policy only: they take turns as all do
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
