"""Decoding in killable child processes: a hostile image costs its own event, nothing more.

Owns the children as a group: feeding, timing, killing and replacing them. Knows nothing of
formats (that is `worker.images`, inside the child), events or Kafka.

One thread talks to all children. Each answers in the order it was asked and has a few images
ahead, so that it need not wait for this process's interpreter between two. When a child is
lost, the image at its head is the one it was working on; those behind go back to the front of
the queue, unblamed.

* An image that takes more than `deadline_seconds` of *processor* time is `undecodable`. A
  starved machine is no fault of the image: the wall clock alone condemns none.
* An image that crashes a child, or on which one makes no progress at all, is tried once more,
  alone; if that child is lost too, it is `undecodable`.
* An image that needs more than `memory_bytes` is `too_large` where its decoder says so, and
  `undecodable` where it merely fails.
* Children that cannot even be started are the infrastructure's fault: InfrastructureError.
"""

import os
import selectors
import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from types import MappingProxyType, TracebackType

from worker.decoder_memory import SLOTS
from worker.decoder_process import DecoderProcess, Job, Pixels, ProcessLost
from worker.errors import EventError, InfrastructureError, Reason
from worker.images import ImageLimits, check_bytes
from worker.threads import show_name, take_long_turns

_STUCK = 10  # times the deadline on the wall without using it up: the child hangs
_MOST_THREADS = 4  # no codec works with more: before, its processor time need not be asked for
_START_SECONDS = 60.0  # for a child to say it is ready
_MOST_FAILED_STARTS = 5  # in a row, before those who wait are told
_MOST_START_PAUSE = 5.0  # seconds


class DecoderPool:
    """`processes` children that turn encoded images into uint8 (size, size, 3).

    `queue` bounds the images waiting for a child; `submit` blocks while it is full. Callbacks
    of the futures run on the pool's own thread and must be quick. A context manager.
    `environment` is all the children get of it: a codec that is taken over finds no password there.
    """

    def __init__(
        self,
        processes: int,
        size: int,
        limits: ImageLimits,
        deadline_seconds: float = 10.0,
        memory_bytes: int = 1024**3,
        *,
        queue: int = 64,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.restarts = 0  # children lost to an image so far
        self._size, self._limits, self._memory_bytes = size, limits, memory_bytes
        self._deadline = deadline_seconds
        self._queue = queue
        self._environment = environment
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closing = self._aborting = False
        self._children: list[DecoderProcess | None] = [None] * processes
        self._failed_starts, self._start_at = 0, 0.0
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        # The kernel binds a child's life to the *thread* that started it: only this one does.
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)
        self._thread.start()

    def submit(self, data: bytes) -> Future[Pixels]:
        """Queue one encoded image. The future fails with EventError or InfrastructureError."""
        job = Job(data)
        try:
            check_bytes(data, self._limits)
        except EventError as error:  # no need to send these anywhere
            job.finish(error)
            return job.future
        with self._changed:
            while len(self._waiting) >= self._queue and not self._closing:
                self._changed.wait()
            if self._closing:
                raise InfrastructureError("the decoder pool is closed")
            self._waiting.append(job)
            if len(self._waiting) == 1:  # else every child is full, and the thread knows
                self._wake()
        return job.future

    def close(self, deadline_seconds: float = 0.0) -> None:
        """Let what was submitted finish within the deadline, then kill; the rest fails with
        InfrastructureError. Returns when no child is left."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._wake()
        self._thread.join(deadline_seconds)
        with self._changed:
            self._aborting = True
            self._wake()
        self._thread.join()

    def __enter__(self) -> "DecoderPool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def pids(self) -> list[int]:
        """The children that run now."""
        return [child.pid for child in self._children if child is not None]

    def _run(self) -> None:
        show_name()
        take_long_turns()  # as the children it starts
        try:
            while not self._finished():
                self._start_missing()
                self._hand_out()
                for key, _ in self._selector.select(self._patience()):
                    self._attend(key.data)
                self._check_clocks()
        finally:
            self._tear_down()

    def _finished(self) -> bool:
        if self._aborting:
            return True
        busy = any(child.jobs for child in self._running())
        return self._closing and not busy and not self._waiting

    def _running(self) -> list[DecoderProcess]:
        return [child for child in self._children if child is not None]

    def _start_missing(self) -> None:
        while None in self._children and time.monotonic() >= self._start_at:
            try:
                child = DecoderProcess(
                    self._size, self._limits, self._memory_bytes, self._environment
                )
            except OSError as error:
                self._start_failed(str(error))
                return
            self._children[self._children.index(None)] = child
            self._selector.register(child.stdout, selectors.EVENT_READ, child)

    def _hand_out(self) -> None:
        """Give what waits to the children with the fewest images, as far as they have room."""
        with self._changed:
            while self._waiting:
                able = [child for child in self._running() if _has_room(child, self._waiting[0])]
                if not able:
                    break
                job = self._waiting.popleft()
                if job.future.running() or job.future.set_running_or_notify_cancel():
                    min(able, key=lambda child: len(child.jobs)).give(job)
            if len(self._waiting) <= self._queue // 2:  # waking a thread for each is dear
                self._changed.notify_all()

    def _attend(self, child: DecoderProcess | None) -> None:
        """A pipe can be read: the wake-up call's, or that of a child."""
        if child is None:
            os.read(self._wake_read, 4096)
        elif child in self._children:  # not lost a moment ago
            self._receive(child)

    def _receive(self, child: DecoderProcess) -> None:
        try:
            for job, result in child.read():
                job.finish(result)
        except ProcessLost:
            self._lost(child, None)
        else:
            self._failed_starts = 0

    def _patience(self) -> float | None:
        """Seconds until a clock must be looked at; None while nothing can run out."""
        if all(child and child.ready and not child.jobs for child in self._children):
            return None
        return min(max(self._deadline / 4, 0.01), 1.0)

    def _check_clocks(self) -> None:
        for child in self._running():
            waited = child.waited()
            if not child.ready:
                if waited > _START_SECONDS:
                    self._lost(child, None)
            elif child.jobs and waited > self._deadline / _MOST_THREADS:
                if child.worked() > self._deadline:
                    detail = f"decoding took longer than {self._deadline:g} s"
                    self._lost(child, EventError(Reason.UNDECODABLE, detail))
                elif waited > self._deadline * _STUCK:
                    self._lost(child, None)

    def _lost(self, child: DecoderProcess, verdict: EventError | None) -> None:
        """Remove a child. `verdict` is for its first image; None: it crashed, or hangs."""
        self._selector.unregister(child.stdout)
        self._children[self._children.index(child)] = None
        ended = child.kill()
        if not child.ready:
            self._start_failed(f"ended with {ended}")
        if not child.jobs:
            return
        self.restarts += 1
        first = child.jobs[0]
        if verdict is None and first.suspect:
            detail = f"the decoder died on it twice ({ended})"
            verdict = EventError(Reason.UNDECODABLE, detail)
        if verdict is not None:
            child.jobs.popleft().finish(verdict)
        first.suspect = True
        with self._changed:
            self._waiting.extendleft(reversed(child.jobs))

    def _start_failed(self, detail: str) -> None:
        """Try again later; after a few times, tell those who wait."""
        self._failed_starts += 1
        pause = min(0.05 * 2**self._failed_starts, _MOST_START_PAUSE)
        self._start_at = time.monotonic() + pause
        if self._failed_starts >= _MOST_FAILED_STARTS:
            self._fail_waiting(f"decoder processes do not start: {detail}")

    def _fail_waiting(self, detail: str) -> None:
        with self._changed:
            jobs, self._waiting = self._waiting, deque()
            self._changed.notify_all()
        for job in jobs:
            if job.future.running() or job.future.set_running_or_notify_cancel():
                job.finish(InfrastructureError(detail))

    def _tear_down(self) -> None:
        """Leave no child, no descriptor and no one waiting, whatever ended the thread."""
        with self._changed:
            self._closing = True
            for child in self._running():
                child.kill()
                self._waiting.extend(child.jobs)
            self._children = [None] * len(self._children)
            self._selector.close()
            os.close(self._wake_read)
            os.close(self._wake_write)
            self._wake_write = -1
        self._fail_waiting("the decoder pool was closed")

    def _wake(self) -> None:
        """Interrupt the thread's wait; call with the lock held."""
        if self._wake_write >= 0:
            os.write(self._wake_write, b"!")


def _has_room(child: DecoderProcess, job: Job) -> bool:
    if not child.ready:
        return False
    if job.suspect:
        return not child.jobs
    return len(child.jobs) < SLOTS and not any(each.suspect for each in child.jobs)
