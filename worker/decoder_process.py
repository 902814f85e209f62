"""This side of one decoder process: its pipes, the images it was given, and its clock.

Owns starting and killing the process and the parent's half of the wire format. Never blocks:
`worker.decoding` calls it when a pipe is ready. Knows nothing of queues or of other processes.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from worker.decoder_child import ANSWER, LENGTH, PIXELS, READY
from worker.decoder_memory import MOST_REFUSAL_BYTES, DecoderMemory, open_memory
from worker.errors import EventError, Reason
from worker.images import ImageLimits

_PACKAGE_ROOT = Path(__file__).resolve().parent.parent
_MOST_RECEIVED = 64  # bytes: all answers that can be there

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
        """Raises OSError where it cannot be started."""
        self.jobs: deque[Job] = deque()
        self.ready = False
        self._shape, self._samples = (size, size, 3), size * size * 3
        self._given = self._answered = 0
        self._received = bytearray()
        shared = open_memory(size, limits.max_bytes)
        try:
            self._memory = DecoderMemory(shared, size, limits.max_bytes)
            self._process = _start(shared, size, limits, memory_bytes, environment)
        finally:
            os.close(shared)  # the child has its own
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self.stdout = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self.stdout, False)
        self._start_clock()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def give(self, job: Job) -> None:
        """Hand an image over; it holds fewer than SLOTS."""
        if not self.jobs:
            self._start_clock()
        self.jobs.append(job)
        self._memory.put_image(self._given, job.data)
        self._given += 1
        with contextlib.suppress(BrokenPipeError):  # that will show itself when reading
            os.write(self._stdin, LENGTH.pack(len(job.data)))

    def read(self) -> Iterator[tuple[Job, Pixels | EventError]]:
        """The jobs whose answers have arrived. Raises ProcessLost once none can come."""
        received = os.read(self.stdout, _MOST_RECEIVED)
        if not received:
            raise ProcessLost
        self._received += received
        if not self.ready:
            self.ready = self._take(len(READY)) == READY
            if not self.ready:
                raise ProcessLost
        self._start_clock()
        while len(self._received) >= ANSWER.size:
            result = self._answer(*ANSWER.unpack(self._take(ANSWER.size)))
            job = self.jobs.popleft()
            self._memory.drop_image(self._answered, len(job.data))
            self._answered += 1
            yield job, result

    def waited(self) -> float:
        """Seconds on the wall since the oldest job was begun."""
        return time.monotonic() - self._since

    def worked(self) -> float:
        """Seconds of processor time since then."""
        cpu = _cpu_seconds(self.pid)
        return self.waited() if cpu is None else cpu - self._cpu_since

    def kill(self) -> str:
        """End it, wait for its end, and say in words how it ended."""
        self._process.kill()
        code = self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._memory.close()
        return f"signal {-code}" if code < 0 else f"status {code}"

    def _take(self, count: int) -> bytes:
        taken = bytes(self._received[:count])
        del self._received[:count]
        return taken

    def _answer(self, status: int, length: int) -> Pixels | EventError:
        pixels = status == PIXELS
        possible = length == self._samples if pixels else length <= MOST_REFUSAL_BYTES
        if not self.jobs or not possible:
            raise ProcessLost
        body = self._memory.answer(self._answered, length)
        return np.frombuffer(body, np.uint8).reshape(self._shape) if pixels else _refusal(body)

    def _start_clock(self) -> None:
        self._since = time.monotonic()
        self._cpu_since = _cpu_seconds(self.pid) or 0.0


def _start(
    shared: int,
    size: int,
    limits: ImageLimits,
    memory_bytes: int,
    environment: Mapping[str, str],
) -> subprocess.Popen[bytes]:
    numbers = (shared, size, limits.max_bytes, limits.max_pixels, memory_bytes, os.getpid())
    return subprocess.Popen(
        [sys.executable, "-m", "worker.decoder_child", *map(str, numbers)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        env=environment,
        pass_fds=(shared,),
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


def _refusal(body: bytearray) -> EventError:
    try:
        reason, detail = body.decode().split("\0", 1)
        return EventError(Reason(reason), detail)
    except ValueError as error:
        raise ProcessLost from error
