"""A worker that sends itself a signal at a named step of the protocol.

`crashing_worker.py STEP COUNT SIGNAL`: the COUNTth time STEP is done, before anything else is.
"""

import os
import signal
import sys
from functools import partial

from worker import service
from worker.__main__ import main
from worker.loop import Loop
from worker.pipeline import Pipeline


class Fault:
    """Told every step; strikes at one of them."""

    def __init__(self, step: str, count: str, name: str) -> None:
        self._step = step
        self._left = int(count)
        self._signal = signal.Signals[name]

    def __call__(self, step: str) -> None:
        """Count; a step is always told by the same thread."""
        if step == self._step:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), self._signal)


if __name__ == "__main__":
    fault = Fault(*sys.argv[1:])
    vars(service)["Pipeline"] = partial(Pipeline, on_step=fault)
    vars(service)["Loop"] = partial(Loop, on_step=fault)
    sys.exit(main([]))
