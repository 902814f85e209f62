"""Calling the infrastructure until it answers: trouble pauses the stream, and loses nothing."""

import logging
import random
from collections.abc import Callable
from threading import Event, Lock
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

    Several threads may call. A call in trouble is in trouble until it succeeds itself: that
    others do, of another kind or for another partition, says nothing about it.
    """

    def __init__(self, what: str, errors: Counter, seconds: Histogram | None = None) -> None:
        """`what` is called, for the log; `errors` counts by kind, `seconds` times tries by op."""
        self._troubles: dict[object, str] = {}  # by the call that waits
        self._lock = Lock()
        self._what = what
        self._errors = errors
        self._seconds = seconds
        self._closed = Event()

    @property
    def trouble(self) -> str | None:
        """What is wrong just now, for readiness; None when all is well."""
        with self._lock:
            return next(iter(self._troubles.values()), None)

    def close(self) -> None:
        """Let waiting calls raise Closed."""
        self._closed.set()

    def __call__(
        self, op: str, call: Callable[Args, Result], *args: Args.args, **kwargs: Args.kwargs
    ) -> Result:
        """The result of `call`; raises Closed, or whatever is no InfrastructureError."""
        waiting = object()
        try:
            return self._until_it_succeeds(waiting, op, lambda: call(*args, **kwargs))
        finally:
            self._forget(waiting, op)

    def _until_it_succeeds(self, waiting: object, op: str, call: Callable[[], Result]) -> Result:
        pause, longest = PAUSE_SECONDS
        while True:
            started = perf_counter()
            try:
                result = call()
            except InfrastructureError as error:
                self._complain(waiting, op, error)
                if self._closed.wait(pause * random.uniform(0.5, 1.5)):
                    raise Closed(op) from error
                pause = min(longest, pause * 2)
                continue
            if self._seconds is not None:
                self._seconds.labels(op).observe(perf_counter() - started)
            return result

    def _complain(self, waiting: object, op: str, error: InfrastructureError) -> None:
        self._errors.labels(type(error.__cause__ or error).__name__).inc()
        with self._lock:
            first = not self._troubles
            self._troubles[waiting] = str(error)
        if first:
            log.warning(
                "%s unavailable, retrying", self._what, extra={"op": op, "error": str(error)}
            )

    def _forget(self, waiting: object, op: str) -> None:
        """The call is over; where it was the last in trouble, say so."""
        with self._lock:
            over = self._troubles.pop(waiting, None) is not None and not self._troubles
        if over and not self._closed.is_set():
            log.info("%s available again", self._what, extra={"op": op})
