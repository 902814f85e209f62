"""Calling the infrastructure until it answers: trouble pauses the stream, and loses nothing."""

import logging
import random
from collections.abc import Callable
from threading import Event
from time import perf_counter
from typing import ParamSpec, TypeVar

from worker.errors import DedupError, InfrastructureError
from worker.metrics import Metrics

log = logging.getLogger(__name__)

Args = ParamSpec("Args")
Result = TypeVar("Result")
PAUSE_SECONDS = (0.05, 2.0)  # first and longest pause between two tries


class Closed(DedupError):
    """The worker was told to stop while it waited for a service."""


class Persistence:
    """Retries calls of the index with growing, jittered pauses until they succeed or it is closed.

    `trouble` tells readiness what is wrong just now; None when all is well.
    """

    def __init__(self, metrics: Metrics) -> None:
        self.trouble: str | None = None
        self._metrics = metrics
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
            self._metrics.redis_seconds.labels(op).observe(perf_counter() - started)
            if self.trouble is not None:
                log.info("index available again", extra={"op": op})
                self.trouble = None
            return result

    def _complain(self, op: str, error: InfrastructureError) -> None:
        self._metrics.redis_errors.labels(type(error.__cause__ or error).__name__).inc()
        if self.trouble is None:
            log.warning("index unavailable, retrying", extra={"op": op, "error": str(error)})
        self.trouble = str(error)
