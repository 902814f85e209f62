"""One child process that never outlives its parent.

Owns starting, signalling and reaping a program whose output goes to a log file. It must not know
what the program is: servers, workers and the demo's producer are all started the same way.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

STOP_SECONDS = 10.0
LOG_TAIL_BYTES = 4_000

# Asks the kernel to kill this process when its parent dies, then becomes the program. A program of
# its own rather than `preexec_fn`, which may deadlock in a parent that runs threads. The signal is
# bound to the parent's *thread*, so start children from one that lives as long as they should.
_LAUNCH = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the parent died first")
os.execv(sys.argv[2], sys.argv[2:])
"""


class ChildFailedError(RuntimeError):
    """A child process ended early or did not become ready; the message ends with its log."""


class Deadline:
    """A point in monotonic time handed down through bounded waits; `seconds` from now."""

    def __init__(self, seconds: float) -> None:
        self._at = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self._at - time.monotonic())

    @property
    def passed(self) -> bool:
        """Whether the time is over."""
        return self.left == 0.0


class ChildProcess:
    """A program started with `arguments` (the first is its absolute path), logging to `log`.

    On Linux the kernel kills it when the starting thread dies in whatever way; elsewhere only
    `stop` and `kill` end it. The log is appended to, so a restart keeps the earlier output.
    """

    def __init__(
        self,
        arguments: Sequence[str | Path],
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.log = log
        launcher = [sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid())]
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [*launcher, *map(str, arguments)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=None if environment is None else dict(environment),
                # Ctrl-C reaches the parent alone, which then stops its children in order.
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None

    @property
    def exit_status(self) -> int | None:
        """The exit status, negative for a signal, None while running."""
        return self._process.poll()

    def stop(self, seconds: float = STOP_SECONDS) -> int:
        """SIGTERM, then SIGKILL after `seconds`; returns the exit status."""
        self._send(signal.SIGCONT)
        self._send(signal.SIGTERM)
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return self.kill()

    def kill(self) -> int:
        """SIGKILL, as a crash would; returns the exit status."""
        self._send(signal.SIGKILL)
        return self._process.wait()

    def pause(self) -> None:
        """SIGSTOP: the process stays, with its sockets open, and answers nothing."""
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT after `pause`."""
        self._send(signal.SIGCONT)

    def failure(self, what: str) -> ChildFailedError:
        """An error saying `what` went wrong, with the end of the log."""
        return ChildFailedError(f"{what}; the end of its log:\n{self.log_tail()}")

    def log_tail(self, size: int = LOG_TAIL_BYTES) -> str:
        """The last `size` bytes of the log as text."""
        return self.log.read_bytes()[-size:].decode(errors="replace")

    def _send(self, number: int) -> None:
        # `send_signal` does nothing for a process already reaped, so no other process is hit.
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)


def free_port() -> int:
    """A loopback TCP port nothing listens on now (another program may still take it first)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
