"""What the kernel knows of a thread: its name, and when it may have the processor."""

import ctypes
import os
import platform
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import get_native_id

import pytest

from tests.faults.fuzz_corpus import samples
from worker.decoding import DecoderPool
from worker.images import ImageLimits
from worker.threads import interrupt_nobody, show_name, take_long_turns

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="these are Linux's")


def batched() -> int:
    """The policy a thread gets by asking for it here; a sandbox may refuse."""
    try:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    except OSError:
        return os.sched_getscheduler(0)
    return os.SCHED_BATCH


def turn(pid: int = 0) -> int:
    """Nanoseconds of a thread's turns (sched_getattr(2)); of the calling one, or a process' first.

    Skips where the scheduler knows none: before Linux 6.12 it answers 0.
    """
    number = {"x86_64": 315, "aarch64": 275}.get(platform.machine())
    if number is None:
        pytest.skip("another machine's system calls")
    about = ctypes.create_string_buffer(48)
    if ctypes.CDLL(None).syscall(number, pid, about, len(about), 0):
        pytest.skip("a sandbox does not tell")
    nanoseconds: int = struct.unpack("=IIQiIQQQ", about.raw)[5]
    if not nanoseconds:
        pytest.skip("a scheduler without slices")
    return nanoseconds


def test_a_thread_shows_its_name() -> None:
    def name() -> str:
        show_name()
        return Path("/proc/thread-self/comm").read_text().strip()

    with ThreadPoolExecutor(1, "seen-by-others-as") as one:
        assert one.submit(name).result() == "seen-by-others-as_0"[:15]


def test_who_is_asked_to_interrupts_nobody_nor_does_who_is_started_by_it() -> None:
    def policies() -> list[int]:
        interrupt_nobody()
        with ThreadPoolExecutor(1) as started:
            return [os.sched_getscheduler(0), started.submit(os.sched_getscheduler, 0).result()]

    before = os.sched_getscheduler(0)
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        assert one.submit(policies).result() == 2 * [other.submit(batched).result()]
    assert os.sched_getscheduler(0) == before  # it is the thread's own


def test_who_computes_takes_long_turns_and_keeps_the_rest() -> None:
    def computing() -> tuple[int, int, int]:
        interrupt_nobody()
        os.setpriority(os.PRIO_PROCESS, get_native_id(), 3)
        take_long_turns()
        niceness = os.getpriority(os.PRIO_PROCESS, get_native_id())
        return turn(), os.sched_getscheduler(0), niceness

    usual = turn()
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        policy = other.submit(batched).result()
        assert one.submit(computing).result() == (10_000_000, policy, 3)
    assert turn() == usual < 10_000_000


def test_so_do_decoders() -> None:
    with DecoderPool(1, 32, ImageLimits()) as pool:
        pool.submit(samples()["jpeg"]).result(60)
        (pid,) = pool.pids()
        assert turn(pid) == 10_000_000
        assert os.getpriority(os.PRIO_PROCESS, pid) >= 10  # they give way all the same
