"""This side of one decoder process: its pipes, the images it was given, and its clock.

Owns starting and killing the process and the parent's half of the wire format. Never blocks:
`worker.decoding` calls it when a pipe is ready. Knows nothing of queues or of other processes.
"""

import contextlib
import fcntl
import itertools
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from worker.decoder_child import ANSWER, LENGTH, PIXELS, READY
from worker.errors import EventError, Reason
from worker.images import ImageLimits

_PACKAGE_ROOT = Path(__file__).resolve().parent.parent
_PIPE_BYTES = 1024 * 1024  # what Linux grants without privileges: a photo in one write
_MOST_BUFFERS = 16  # of one writev
_MOST_REFUSAL_BYTES = 4096

Pixels = NDArray[np.uint8]


class ProcessLost(Exception):
    """The process ended, or answered nonsense."""


@dataclass(eq=False)
class Job:
    """One image on its way. `suspect`: a process died on it, so now it goes alone."""

    data: bytes
    future: Future[Pixels] = field(default_factory=Future)
    suspect: bool = False

    def finish(self, result: Pixels | Exception) -> None:
        """Hand pixels or an error to whoever waits."""
        if isinstance(result, Exception):
            self.future.set_exception(result)
        else:
            self.future.set_result(result)


class DecoderProcess:
    """A running `python -m worker.decoder_child`; `jobs` holds what it owes, oldest first."""

    def __init__(
        self,
        size: int,
        limits: ImageLimits,
        memory_bytes: int,
        environment: Mapping[str, str],
    ) -> None:
        self.jobs: deque[Job] = deque()
        self.ready = False
        self._shape, self._samples = (size, size, 3), size * size * 3
        self._outgoing: deque[memoryview] = deque()
        self._head = bytearray(len(READY))
        self._body: Pixels | bytearray | None = None
        self._wanted = memoryview(self._head)
        self._process = _start(size, limits, memory_bytes, environment)
        assert self._process.stdin is not None and self._process.stdout is not None
        self.stdin, self.stdout = self._process.stdin.fileno(), self._process.stdout.fileno()
        for pipe in (self.stdin, self.stdout):
            os.set_blocking(pipe, False)
            with contextlib.suppress(OSError, AttributeError):  # a smaller pipe does, more slowly
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._start_clock()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def wants_to_write(self) -> bool:
        """Whether the pipe was too full for all that was given."""
        return bool(self._outgoing)

    def give(self, job: Job) -> None:
        """Send an image, as far as the pipe takes it now."""
        if not self.jobs:
            self._start_clock()
        self.jobs.append(job)
        self._outgoing += (memoryview(LENGTH.pack(len(job.data))), memoryview(job.data))
        self.write()

    def write(self) -> None:
        """Go on sending. A broken pipe will show itself when reading."""
        try:
            while self._outgoing:
                buffers = [*itertools.islice(self._outgoing, _MOST_BUFFERS)]
                self._sent(os.writev(self.stdin, buffers))
        except BlockingIOError:
            return
        except BrokenPipeError:
            self._outgoing.clear()

    def read(self) -> list[tuple[Job, Pixels | EventError]]:
        """The jobs whose answers have arrived. Raises ProcessLost once none can come."""
        done: list[tuple[Job, Pixels | EventError]] = []
        while True:
            try:
                count = os.readv(self.stdout, [self._wanted])
            except BlockingIOError:
                return done
            if count == 0:
                if done:
                    return done  # the end is still there at the next call
                raise ProcessLost
            self._wanted = self._wanted[count:]
            if not self._wanted and (result := self._filled()) is not None:
                done.append((self.jobs.popleft(), result))
                self._start_clock()

    def spent(self) -> tuple[float, float]:
        """Seconds since the oldest job was begun: of processor time, and on the wall."""
        wall = time.monotonic() - self._since
        cpu = _cpu_seconds(self.pid)
        return (wall if cpu is None else cpu - self._cpu_since), wall

    def kill(self) -> str:
        """End it, wait for its end, and say in words how it ended."""
        self._process.kill()
        code = self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        return f"signal {-code}" if code < 0 else f"status {code}"

    def _sent(self, count: int) -> None:
        while count:
            first = self._outgoing.popleft()
            if count < len(first):
                self._outgoing.appendleft(first[count:])
                return
            count -= len(first)

    def _filled(self) -> Pixels | EventError | None:
        """The buffer that was wanted is full: set up the next one; an answer when complete."""
        if not self.ready:
            self.ready = bytes(self._head) == READY
            if not self.ready:
                raise ProcessLost
        elif self._body is None:
            self._expect_body(*ANSWER.unpack(self._head))
            return None
        body, self._body = self._body, None
        self._head = bytearray(ANSWER.size)
        self._wanted = memoryview(self._head)
        return _refusal(bytes(body)) if isinstance(body, bytearray) else body

    def _expect_body(self, status: int, length: int) -> None:
        pixels = status == PIXELS
        wanted = self._samples if pixels else min(length, _MOST_REFUSAL_BYTES)
        if not self.jobs or length != wanted:
            raise ProcessLost
        if pixels:
            self._body = np.empty(self._shape, np.uint8)
            self._wanted = self._body.data.cast("B")
        else:
            self._body = bytearray(length)
            self._wanted = memoryview(self._body)

    def _start_clock(self) -> None:
        self._since = time.monotonic()
        self._cpu_since = _cpu_seconds(self.pid) or 0.0


def _start(
    size: int, limits: ImageLimits, memory_bytes: int, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    numbers = (size, limits.max_bytes, limits.max_pixels, memory_bytes, os.getpid())
    return subprocess.Popen(
        [sys.executable, "-m", "worker.decoder_child", *map(str, numbers)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        env=environment,
        cwd=_PACKAGE_ROOT,  # `-m` looks there first
        process_group=0,  # Ctrl-C reaches the parent alone
    )


def _cpu_seconds(pid: int) -> float | None:
    """Processor time of a child so far; None where the system has no such clock.

    The clock id is what clock_getcpuclockid(3) computes on Linux.
    """
    if sys.platform != "linux":
        return None
    try:
        return time.clock_gettime(~pid << 3 | 2)
    except OSError:  # it has ended; reading will tell
        return None


def _refusal(body: bytes) -> EventError:
    try:
        reason, detail = body.decode().split("\0", 1)
        return EventError(Reason(reason), detail)
    except ValueError as error:
        raise ProcessLost from error
