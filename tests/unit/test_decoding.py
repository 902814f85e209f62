"""DecoderPool: what a lost, slow, greedy or frozen child does to its image and to the others.

Children are real processes, and really killed. Nothing here asserts how long anything took.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from functools import cache
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.faults.fuzz_corpus import png_bomb, png_file, samples, zeros
from worker import decoding
from worker.config import Settings
from worker.decoder_process import Pixels
from worker.decoding import DecoderPool
from worker.errors import EventError, InfrastructureError, Reason
from worker.images import ImageLimits, decode
from worker.service import Service

ROOT = Path(__file__).parents[2]
SIZE = 32
LIMITS = ImageLimits()
PATIENCE = 60.0  # seconds after which a test has failed


@cache
def slow_image() -> bytes:
    """49 Mpx in 143 kB: half a second or more of a processor, 150 MB or more of memory."""
    return png_bomb(7000, 7000)


@pytest.fixture
def pool() -> Iterator[DecoderPool]:
    """One child, started and idle."""
    with DecoderPool(1, SIZE, LIMITS, deadline_seconds=30.0, queue=2) as pool:
        pool.submit(samples()["jpeg"]).result(PATIENCE)
        yield pool


def until(true: Callable[[], bool]) -> None:
    """Wait for something to become true; fail after PATIENCE."""
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


def freeze(pool: DecoderPool) -> int:
    """Stop the only child in its tracks; what it is given stays undone."""
    (pid,) = pool.pids()
    os.kill(pid, signal.SIGSTOP)
    until(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    return pid


def resident(pid: int) -> int:
    """Memory a process holds, in bytes; 0 once it is gone."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def refusal(future: Future[Pixels]) -> EventError:
    """The EventError a future ends with."""
    error = future.exception(PATIENCE)
    assert isinstance(error, EventError)
    return error


def test_pixels_are_those_of_the_one_preprocessing() -> None:
    with DecoderPool(2, SIZE, LIMITS) as pool:
        futures = {name: pool.submit(data) for name, data in samples().items()}
        for name, future in futures.items():
            expected = decode(samples()[name], SIZE, LIMITS)
            np.testing.assert_array_equal(future.result(PATIENCE), expected, name)
            assert future.result().flags.writeable


def test_a_refusal_travels_with_its_reason(pool: DecoderPool) -> None:
    truncated = samples()["png"][:-40]
    error = refusal(pool.submit(truncated))
    assert error.reason is Reason.UNDECODABLE
    assert error.detail.startswith("PNG: ")
    assert refusal(pool.submit(b"<svg/>")).reason is Reason.UNSUPPORTED_FORMAT
    assert pool.restarts == 0


def test_slow_image_is_refused_and_the_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    # Children are nice: on a busy machine one may have less than a tenth of a core.
    monkeypatch.setattr(decoding, "_STUCK", 1000)
    good = samples()["jpeg"]
    with DecoderPool(1, SIZE, LIMITS, deadline_seconds=0.1) as pool:
        slow, *others = [pool.submit(data) for data in (slow_image(), *[good] * 20)]
        error = refusal(slow)
        assert (error.reason, error.detail) == (
            Reason.UNDECODABLE,
            "decoding took longer than 0.1 s",
        )
        for other in others:
            assert other.result(PATIENCE).shape == (SIZE, SIZE, 3)
        assert pool.restarts == 1


def test_greedy_image_is_too_large_and_costs_no_child() -> None:
    with DecoderPool(1, SIZE, LIMITS, memory_bytes=64 << 20) as pool:
        assert refusal(pool.submit(slow_image())).reason is Reason.TOO_LARGE
        assert pool.submit(samples()["jpeg"]).result(PATIENCE).any()
        assert pool.restarts == 0


def test_crash_retries_its_image_and_blames_nobody(pool: DecoderPool) -> None:
    pid = freeze(pool)
    futures = [pool.submit(samples()["jpeg"]) for _ in range(4)]
    until(lambda: all(future.running() for future in futures))
    os.kill(pid, signal.SIGKILL)
    for future in futures:
        assert future.result(PATIENCE).any()
    assert pool.restarts == 1
    assert pool.pids() != [pid]


def test_image_that_crashes_two_children_is_a_dead_letter(pool: DecoderPool) -> None:
    doomed = pool.submit(slow_image())
    others = [pool.submit(samples()["jpeg"]) for _ in range(3)]
    for deaths in (1, 2):
        until(lambda: any(resident(pid) > 100 << 20 for pid in pool.pids()))
        os.kill(pool.pids()[0], signal.SIGSEGV)
        until(lambda deaths=deaths: pool.restarts == deaths)  # type: ignore[misc]
    error = refusal(doomed)
    assert error.reason is Reason.UNDECODABLE
    assert error.detail == "the decoder died on it twice (signal 11)"
    assert all(other.result(PATIENCE).any() for other in others)


def test_frozen_child_is_replaced_and_its_image_retried() -> None:
    with DecoderPool(1, SIZE, LIMITS, deadline_seconds=0.3) as pool:
        pool.submit(samples()["jpeg"]).result(PATIENCE)
        freeze(pool)
        assert pool.submit(samples()["jpeg"]).result(PATIENCE).any()
        assert pool.restarts == 1


def test_queue_is_bounded(pool: DecoderPool) -> None:
    pid = freeze(pool)
    full = threading.Event()
    submitted: list[Future[Pixels]] = []

    def flood() -> None:
        for _ in range(40):
            submitted.append(pool.submit(samples()["jpeg"]))
        full.set()

    thread = threading.Thread(target=flood)
    thread.start()
    until(lambda: len(submitted) == 6)  # four at the child, two in the queue
    assert not full.wait(0.5)
    assert len(submitted) == 6
    os.kill(pid, signal.SIGCONT)
    thread.join(PATIENCE)
    assert all(future.result(PATIENCE).any() for future in submitted)


def test_cancelled_image_is_skipped(pool: DecoderPool) -> None:
    pid = freeze(pool)
    futures = [pool.submit(samples()["jpeg"]) for _ in range(6)]
    assert futures[-1].cancel()
    os.kill(pid, signal.SIGCONT)
    assert all(future.result(PATIENCE).any() for future in futures[:-1])
    with pytest.raises(CancelledError):
        futures[-1].result(PATIENCE)
    assert pool.submit(samples()["png"]).result(PATIENCE).any()


def test_close_finishes_what_it_can_and_fails_the_rest() -> None:
    pool = DecoderPool(1, SIZE, LIMITS)
    finished = [pool.submit(samples()["jpeg"]) for _ in range(10)]
    pool.close(PATIENCE)
    assert all(future.result(0).any() for future in finished)
    with pytest.raises(InfrastructureError):
        pool.submit(samples()["jpeg"])


def test_close_kills_what_does_not_end(pool: DecoderPool) -> None:
    pid = freeze(pool)
    futures = [pool.submit(samples()["jpeg"]) for _ in range(6)]
    pool.close(0.1)
    assert all(isinstance(future.exception(0), InfrastructureError) for future in futures)
    assert not psutil.pid_exists(pid)
    assert pool.pids() == []
    pool.close()  # twice does no harm


def test_children_that_do_not_start_are_no_fault_of_the_image(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with DecoderPool(1, SIZE, LIMITS) as pool:
        error = pool.submit(samples()["jpeg"]).exception(PATIENCE)
        assert isinstance(error, InfrastructureError)
        assert str(error) == "decoder processes do not start: ended with status 1"
        monkeypatch.undo()
        assert pool.submit(samples()["jpeg"]).result(PATIENCE).any()


def test_children_of_a_worker_hold_no_setting_and_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEDUP_SECURITY_PROTOCOL", "SASL_SSL")
    monkeypatch.setenv("DEDUP_SASL_MECHANISM", "PLAIN")
    monkeypatch.setenv("DEDUP_SASL_USERNAME", "worker")
    monkeypatch.setenv("DEDUP_SASL_PASSWORD", "hush-1")
    monkeypatch.setenv("DEDUP_REDIS_URL", "redis://:hush-2@localhost/0")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-3")
    monkeypatch.setenv("SOME_TOKEN", "hush-4")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    service = Service(Settings(decode_processes=1), "test")
    with service._decoders(SIZE) as pool, DecoderPool(1, SIZE, LIMITS) as bare:
        for each in (pool, bare):
            each.submit(samples()["jpeg"]).result(PATIENCE)
        (child,), (other,) = pool.pids(), bare.pids()
        environment = psutil.Process(child).environ()
        assert psutil.Process(other).environ() == {}
    assert environment["PATH"] and environment["LC_ALL"] == "C.UTF-8"
    assert "hush" not in str(environment)
    assert not any(name.startswith(("DEDUP_", "AWS_")) for name in environment)


PARENT = f"""
import time
from tests.faults.fuzz_corpus import samples, scan_bomb
from worker.decoding import DecoderPool
from worker.images import ImageLimits
pool = DecoderPool(1, {SIZE}, ImageLimits(), deadline_seconds=600.0)
pool.submit(samples()["png"]).result()
busy = pool.submit(scan_bomb(10_000))
while not busy.running():
    time.sleep(0.01)
print(*pool.pids(), flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal")
def test_busy_child_dies_with_a_killed_parent() -> None:
    """One that waits sees its input end; this one would decode on for minutes."""
    command = [sys.executable, "-c", PARENT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    child.wait(PATIENCE)


def test_pillows_own_limit_does_not_overrule_ours() -> None:
    """400 Mpx of one bit: Pillow alone would refuse them; we find that most are missing."""
    data = png_file(20_000, 20_000, zeros(1 << 20), depth_colour=b"\x01\x00")
    with DecoderPool(1, SIZE, ImageLimits(max_pixels=400_000_000)) as pool:
        error = refusal(pool.submit(data))
    assert error.reason is Reason.UNDECODABLE
    assert error.detail.startswith("PNG: image file is truncated")


def test_children_leave_signals_to_the_parent_and_stay_small(pool: DecoderPool) -> None:
    (pid,) = pool.pids()
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(pid, number)
    assert pool.submit(samples()["jpeg"]).result(PATIENCE).any()
    assert pool.pids() == [pid]
    maps = {mapped.path for mapped in psutil.Process(pid).memory_maps()}
    assert not any("torch" in path for path in maps)
    assert os.getpriority(os.PRIO_PROCESS, pid) == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 10)
