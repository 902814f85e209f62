"""A worker whose wall clock jumps from one second to the next; `jumping_worker.py SECONDS…`.

Each of SECONDS is how far the clock is off, for a second, in turn; SIGUSR1 sets it right for good.
Timestamps of messages follow it; `decided_at`, which is read in C, does not.
"""

import signal
import sys
import time
from collections.abc import Callable, Sequence


class Clock:
    """What `time.time` and `time.time_ns` answer from now on."""

    def __init__(self, off_by: Sequence[float]) -> None:
        self._off_by = off_by
        self._seconds: Callable[[], float] = time.time
        vars(time).update(time=self.seconds, time_ns=self.nanoseconds)
        signal.signal(signal.SIGUSR1, lambda *_: self._set_right())

    def seconds(self) -> float:
        """Seconds since the epoch, or not."""
        return self._seconds() + self._off_by[int(time.monotonic()) % len(self._off_by)]

    def nanoseconds(self) -> int:
        """The same as `seconds`."""
        return int(self.seconds() * 1e9)

    def _set_right(self) -> None:
        self._off_by = (0.0,)


if __name__ == "__main__":
    Clock([float(argument) for argument in sys.argv[1:]])  # before anything imports `time`'s names
    from worker.__main__ import main

    sys.exit(main([]))
