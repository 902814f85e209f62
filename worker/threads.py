"""What the operating system knows of threads: their names, and how it shares the processor out.

Knows nothing of what the threads do.
"""

import ctypes
import os
import platform
import struct
import sys
from contextlib import suppress
from threading import current_thread

_PR_SET_NAME = 15  # linux/prctl.h; the kernel keeps 15 bytes
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}  # its number; glibc names it from 2.41 on only
# sched_attr of sched_setattr(2): size, policy, flags, nice, priority, runtime, deadline, period
_ATTRIBUTES = struct.Struct("=IIQiIQQQ")
_TURN_NS = 10_000_000


def show_name() -> None:
    """Give the calling thread's Python name to the kernel (Python does so itself from 3.14).

    So `top -H`, profilers and the benchmark show it. Threads it starts, as torch's, inherit it.
    """
    if sys.platform == "linux":
        name = current_thread().name.encode()[:15]
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name, 0, 0, 0)


def interrupt_nobody() -> None:
    """Let the calling thread, when it wakes, wait for who has the processor.

    A worker's threads wake each other many times for every image, and in turns of a millisecond
    each finds the caches full of another's. This is SCHED_BATCH of sched(7), which threads and
    processes it starts inherit.
    """
    if sys.platform == "linux":
        with suppress(OSError):  # a sandbox may know one policy only: they take turns as all do
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def take_long_turns() -> None:
    """Ask for turns of 10 ms instead of the kernel's 1 to 3: for who computes all the time.

    Does nothing before Linux 6.12, whose scheduler (EEVDF) knows slices; inherited likewise.
    """
    if (number := _SCHED_SETATTR.get(platform.machine())) is not None and sys.platform == "linux":
        policy, niceness = os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)
        asked = _ATTRIBUTES.pack(_ATTRIBUTES.size, policy, 0, niceness, 0, _TURN_NS, 0, 0)
        ctypes.CDLL(None).syscall(number, 0, asked, 0)  # refused: turns stay as they are
