"""Calling the infrastructure until it answers: trouble pauses the stream, and loses nothing."""

import logging
import random
from collections.abc import Callable
from threading import Event
from time import perf_counter
from typing import ParamSpec, TypeVar

from prometheus_client import Counter, Histogram

from worker.errors import DedupError, InfrastructureError

log = logging.getLogger(__name__)

Args = ParamSpec("Args")
Result = TypeVar("Result")
PAUSE_SECONDS = (0.05, 2.0)  # first and longest pause between two tries


class Closed(DedupError):
    """The worker was told to stop while it waited for a service."""


class Persistence:
    """Retries calls with growing, jittered pauses until they succeed or it is closed.

    `trouble` tells readiness what is wrong just now; None when all is well.
    """

    def __init__(self, what: str, errors: Counter, seconds: Histogram | None = None) -> None:
        """`what` is called, for the log; `errors` counts by kind, `seconds` times tries by op."""
        self.trouble: str | None = None
        self._what = what
        self._errors = errors
        self._seconds = seconds
        self._closed = Event()

    def close(self) -> None:
        """Let waiting calls raise Closed."""
        self._closed.set()

    def __call__(
        self, op: str, call: Callable[Args, Result], *args: Args.args, **kwargs: Args.kwargs
    ) -> Result:
        """The result of `call`; raises Closed, or whatever is no InfrastructureError."""
        pause, longest = PAUSE_SECONDS
        while True:
            started = perf_counter()
            try:
                result = call(*args, **kwargs)
            except InfrastructureError as error:
                self._complain(op, error)
                if self._closed.wait(pause * random.uniform(0.5, 1.5)):
                    raise Closed(op) from error
                pause = min(longest, pause * 2)
                continue
            if self._seconds is not None:
                self._seconds.labels(op).observe(perf_counter() - started)
            if self.trouble is not None:
                log.info("%s available again", self._what, extra={"op": op})
                self.trouble = None
            return result

    def _complain(self, op: str, error: InfrastructureError) -> None:
        self._errors.labels(type(error.__cause__ or error).__name__).inc()
        if self.trouble is None:
            log.warning(
                "%s unavailable, retrying", self._what, extra={"op": op, "error": str(error)}
            )
        self.trouble = str(error)
