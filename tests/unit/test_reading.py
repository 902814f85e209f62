"""Fetches start in order and hold no more than their budget."""

import subprocess
import sys
from concurrent.futures import Future
from threading import Event

import pytest

from worker.errors import EventError, Reason
from worker.reading import Reader

LARGEST = 100
END_SECONDS = 60.0
HANGING = """
from threading import Event
from worker.reading import Reader

began = Event()

def fetch(uri: str) -> bytes:
    began.set()
    Event().wait()
    return b""

reader = Reader(fetch, concurrency=2, budget=1, largest=1)
reader.submit("a")
began.wait()
reader.close()
"""


class Source:
    """Fetches that end when told."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.gates: dict[str, Event] = {}
        self.began: dict[str, Event] = {name: Event() for name in "abcd"}

    def fetch(self, uri: str) -> bytes:
        self.started.append(uri)
        self.gates[uri] = Event()
        self.began[uri].set()
        assert self.gates[uri].wait(10)
        return b"x" * 10

    def finish(self, uri: str, future: "Future[bytes]") -> bytes:
        assert self.began[uri].wait(10)
        self.gates[uri].set()
        return future.result(10)


def test_the_budget_bounds_what_is_fetched_and_held() -> None:
    source = Source()
    reader = Reader(source.fetch, concurrency=4, budget=2 * LARGEST, largest=LARGEST)
    futures = {uri: reader.submit(uri) for uri in "abcd"}
    assert source.began["b"].wait(10)
    assert not source.began["c"].wait(0.05)
    assert source.finish("a", futures["a"]) == b"x" * 10
    assert not source.began["c"].wait(0.05)  # 10 held and 100 reserved leave no room for 100
    reader.release(10)
    assert source.began["c"].wait(10)
    source.finish("b", futures["b"])
    source.finish("c", futures["c"])
    reader.release(20)
    source.finish("d", futures["d"])
    assert source.started == ["a", "b", "c", "d"]
    reader.close()


def test_a_budget_below_one_image_still_lets_one_through() -> None:
    source = Source()
    reader = Reader(source.fetch, concurrency=4, budget=1, largest=LARGEST)
    first, second = reader.submit("a"), reader.submit("b")
    source.finish("a", first)
    assert not source.began["b"].wait(0.05)
    reader.release(10)
    source.finish("b", second)
    reader.close()


def test_a_failed_fetch_gives_its_reservation_back() -> None:
    def gone(uri: str) -> bytes:
        raise EventError(Reason.SOURCE_GONE, uri)

    reader = Reader(gone, concurrency=1, budget=LARGEST, largest=LARGEST)
    for _ in range(3):
        with pytest.raises(EventError):
            reader.submit("a").result(10)
    reader.close()


def test_a_fetch_that_hangs_does_not_keep_the_process() -> None:
    subprocess.run([sys.executable, "-c", HANGING], check=True, timeout=END_SECONDS)


def test_what_has_not_begun_when_it_is_closed_never_does() -> None:
    source = Source()
    reader = Reader(source.fetch, concurrency=1, budget=4 * LARGEST, largest=LARGEST)
    first, second = reader.submit("a"), reader.submit("b")
    assert source.began["a"].wait(10)
    reader.close()
    source.finish("a", first)
    assert not source.began["b"].wait(0.05)
    assert not second.done()
