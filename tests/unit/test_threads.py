"""What the kernel knows of a thread: its name, and when it may have the processor."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.faults.fuzz_corpus import samples
from worker.decoding import DecoderPool
from worker.images import ImageLimits
from worker.threads import interrupt_nobody, show_name

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="these are Linux's")


def batched() -> int:
    """The policy a thread gets by asking for it here; a sandbox may refuse."""
    try:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    except OSError:
        return os.sched_getscheduler(0)
    return os.SCHED_BATCH


def test_a_thread_shows_its_name() -> None:
    def name() -> str:
        show_name()
        return Path("/proc/thread-self/comm").read_text().strip()

    with ThreadPoolExecutor(1, "seen-by-others-as") as one:
        assert one.submit(name).result() == "seen-by-others-as_0"[:15]


def test_who_computes_interrupts_nobody() -> None:
    def policy() -> int:
        interrupt_nobody()
        return os.sched_getscheduler(0)

    before = os.sched_getscheduler(0)
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        assert one.submit(policy).result() == other.submit(batched).result()
    assert os.sched_getscheduler(0) == before  # it is the thread's own


def test_nor_do_decoders() -> None:
    with ThreadPoolExecutor(1) as one, DecoderPool(1, 32, ImageLimits()) as pool:
        pool.submit(samples()["jpeg"]).result(60)
        (pid,) = pool.pids()
        assert os.sched_getscheduler(pid) == one.submit(batched).result()
