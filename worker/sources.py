"""From an event's uri to the bytes of its image, guarded.

Owns the choice of source, the tries and the pauses between them. Knows nothing of images, events or
Kafka. No error shows a uri: signatures and tokens travel in them.
"""

import random
import re
import threading

from worker.errors import EventError, InfrastructureError, Reason
from worker.source_file import FileSource
from worker.source_http import HttpSource
from worker.source_policy import Deadline, SourcePolicy, Unavailable
from worker.source_s3 import S3Source

__all__ = ["Fetcher", "SourcePolicy"]

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*")
_FIRST_PAUSE = 0.25  # seconds; the bound of the pause doubles with every try


class Fetcher:
    """Fetches images as a policy allows. Thread-safe; blocks the calling thread.

    A fetch takes at most `attempts * timeout_seconds + retry_seconds`, but for disks that hang.
    """

    def __init__(self, policy: SourcePolicy) -> None:
        self._policy = policy
        self._http = HttpSource(policy)
        self._file = FileSource(policy)
        self._s3 = S3Source(policy) if "s3" in policy.schemes else None
        self._closed = threading.Event()
        self._random = random.Random()

    def fetch(self, uri: str) -> bytes:
        """Return the bytes at `uri`, at most `max_bytes`.

        Raises EventError: blocked_source, source_gone, source_denied, source_unavailable,
        too_large, unsupported_format (a content encoding). Raises InfrastructureError when
        closed, when a root folder is gone, when nothing can be signed for s3, or when this process
        is out of descriptors.
        """
        self._check_open()
        if not uri.isascii() and any("\ud800" <= each <= "\udfff" for each in uri):
            raise EventError(Reason.BLOCKED_SOURCE, "the uri is malformed")  # JSON may hold these
        scheme, colon, _ = uri.lower().partition(":")
        if not colon or not _SCHEME.fullmatch(scheme):  # a path with a colon in its query, say
            raise EventError(Reason.BLOCKED_SOURCE, "a uri without a scheme")
        if scheme not in self._policy.schemes:
            raise EventError(Reason.BLOCKED_SOURCE, f"scheme {scheme[:20]!r} is not allowed")
        paused, tries = 0.0, 0
        while True:
            tries += 1
            try:
                return self._once(scheme, uri)
            except Unavailable as trouble:
                self._check_open()
                pause = self._pause(tries, trouble.retry_after)
                paused += pause
                if tries >= self._policy.attempts or paused > self._policy.retry_seconds:
                    detail = f"{trouble}, {tries} tries"
                    raise EventError(Reason.SOURCE_UNAVAILABLE, detail) from trouble
            self._closed.wait(pause)
            self._check_open()

    def close(self) -> None:
        """Stop: fetches under way and later ones end with InfrastructureError."""
        self._closed.set()
        self._http.close()
        if self._s3:
            self._s3.close()

    def _once(self, scheme: str, uri: str) -> bytes:
        if scheme == "file":
            return self._file.get(uri)
        source = self._s3 if scheme == "s3" and self._s3 else self._http
        return source.get(uri, Deadline(self._policy.timeout_seconds))

    def _pause(self, tries: int, retry_after: float | None) -> float:
        """Seconds: a random part of a doubling bound, on top of what the source asked for."""
        jitter = self._random.uniform(0, _FIRST_PAUSE * 2 ** (tries - 1))
        return (retry_after or 0.0) + jitter

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise InfrastructureError("fetching was stopped")
