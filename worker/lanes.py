"""Jobs between two stages: one lane a partition, order kept inside, none waiting for another's.

A lane's head is handed on once it is ready; a slow job holds back its own partition only.
"""

from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from queue import Empty, Queue
from threading import Condition, Lock
from time import monotonic
from typing import Generic, TypeVar

from worker.offsets import Partition

Job = TypeVar("Job")
Taken = TypeVar("Taken")
Name = TypeVar("Name", bound=Hashable)

CROWDED = 25  # times the patience, where so much is on its way that what comes last waits anyway
LULL = 10  # times it: what has not come after so long is held up by something


def take_all(queue: "Queue[list[Job]]", timeout: float | None = None) -> list[Job]:
    """Wait for one batch and join to it what else is queued: who is behind takes larger ones.

    Raises queue.Empty when nothing comes within `timeout` seconds.
    """
    jobs = list(queue.get(timeout=timeout))
    with suppress(Empty):
        while True:
            jobs += queue.get_nowait()
    return jobs


def gather(
    queue: "Queue[list[Job]]", enough: int, most: int, patience: float, coming: Callable[[], int]
) -> list[Job]:
    """Wait for one batch, then up to `patience` seconds for more, while others are on their way.

    `coming` says how many those are: a lone job never waits. An empty batch ends the waiting, and
    where `enough` are together nobody waits for more. Where `most` are on their way, those last
    wait anyway: then it is `most` that are gathered, for up to `CROWDED` times as long, as long as
    there is no lull.
    """
    jobs, started = take_all(queue), monotonic()
    while 0 < len(jobs) < most and (others := coming()):
        crowded = len(jobs) + others >= most
        if len(jobs) >= enough and not crowded:
            break
        limit = started + patience * (CROWDED if crowded else 1) - monotonic()
        try:
            more = take_all(queue, max(0.0, min(limit, patience * LULL)))
        except Empty:
            break
        if not more:
            break
        jobs += more
    return jobs


class Lanes(Generic[Job]):
    """A thread-safe queue of jobs, ordered by partition. How many it holds, its user bounds."""

    def __init__(self, partition: Callable[[Job], Partition], ready: Callable[[Job], bool]) -> None:
        self._partition = partition
        self._ready = ready
        self._lanes: dict[Partition, deque[Job]] = {}
        self._changed = Condition()
        self._closed = False

    def put(self, jobs: list[Job]) -> None:
        """Append jobs to their lanes."""
        with self._changed:
            for job in jobs:
                self._lanes.setdefault(self._partition(job), deque()).append(job)
            self._changed.notify()

    def wake(self) -> None:
        """Tell a waiting `take` that some job has become ready."""
        with self._changed:
            self._changed.notify()

    def close(self) -> None:
        """Let `take` return what is ready and then nothing."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def take(self, most: int, patience: Callable[[int], float] = lambda coming: 0.0) -> list[Job]:
        """Wait for ready heads; return up to `most` of them, or [] once closed and empty.

        With at least one ready, wait for more, but only while other jobs are here and on their
        way: a lone job never waits. `patience` says for how many seconds, where so many jobs are
        taken or not ready yet; those that are ready behind one that is not may wait for long.
        """
        with self._changed:
            taken: list[Job] = []
            until: float | None = None
            while True:
                self._collect(taken, most)
                if self._closed or len(taken) == most or (taken and not self._lanes):
                    return taken
                if taken and until is None:
                    until = monotonic() + patience(len(taken) + self._unready())
                remaining = None if until is None else until - monotonic()
                if remaining is not None and remaining <= 0:
                    return taken
                self._changed.wait(remaining)

    def _unready(self) -> int:
        return sum(not self._ready(job) for lane in self._lanes.values() for job in lane)

    def _collect(self, taken: list[Job], most: int) -> None:
        for partition in list(self._lanes):
            lane = self._lanes[partition]
            while lane and len(taken) < most and self._ready(lane[0]):
                taken.append(lane.popleft())
            if not lane:
                del self._lanes[partition]
            elif len(taken) < most or self._ready(lane[0]):
                # Last served goes last, so that a busy partition cannot starve the others.
                self._lanes[partition] = self._lanes.pop(partition)
            if len(taken) == most:
                return


class InLine(Generic[Name]):
    """How many of each name are between two stages; none is kept of a name once all are through."""

    def __init__(self) -> None:
        self._counts: dict[Name, int] = {}
        self._lock = Lock()

    def __contains__(self, name: Name) -> bool:
        return name in self._counts

    def __len__(self) -> int:
        return len(self._counts)

    def enter(self, name: Name) -> None:
        """One more is in line."""
        with self._lock:
            self._counts[name] = self._counts.get(name, 0) + 1

    def leave(self, name: Name) -> None:
        """One that entered is through."""
        with self._lock:
            self._counts[name] -= 1
            if not self._counts[name]:
                del self._counts[name]


class Turns(Generic[Taken]):
    """Threads that take in turn, work side by side, and hand on in the order in which they took."""

    def __init__(self) -> None:
        self._taking = Lock()
        self._handing = Condition()
        self._taken = self._handed_on = 0

    @property
    def open(self) -> bool:
        """Whether something taken is still to be handed on."""
        return self._handed_on < self._taken

    def take(self, take: Callable[[], Taken]) -> tuple[int, Taken]:
        """What `take` returns, with its turn; one thread at a time is inside it."""
        with self._taking:
            taken = take()
            turn = self._taken
            self._taken += 1
        return turn, taken

    @contextmanager
    def wait_for(self, turn: int) -> Iterator[None]:
        """Hand on what was taken at `turn` inside: once all before it are handed on."""
        with self._handing:
            self._handing.wait_for(lambda: self._handed_on == turn)
            yield
            self._handed_on += 1
            self._handing.notify_all()
