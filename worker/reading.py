"""Fetching in threads, in order, with a bound on the bytes held.

Knows uris and bytes; not events, not what is done with the images.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock

from worker.threads import show_name

Fetch = Callable[[str], bytes]


class Reader:
    """Starts fetches in the order they are asked for, while their bytes fit the budget.

    A fetch reserves the largest size it may have until its real size is known, and holds that until
    `release`. First come, first started: an early image never waits for budget that later ones of
    its partition hold while they wait for it.
    """

    def __init__(self, fetch: Fetch, concurrency: int, budget: int, largest: int) -> None:
        """`budget` bytes may be held together; one fetch alone is always let through."""
        self._fetch = fetch
        self._threads = ThreadPoolExecutor(concurrency, "fetch", initializer=show_name)
        self._budget = budget
        self._largest = largest
        self._lock = Lock()
        self._held = 0
        self._waiting: deque[tuple[str, Future[bytes]]] = deque()

    def submit(self, uri: str) -> "Future[bytes]":
        """The bytes of `uri` to come, or what its fetch raised."""
        future: Future[bytes] = Future()
        with self._lock:
            self._waiting.append((uri, future))
        self._start()
        return future

    def release(self, size: int) -> None:
        """`size` fetched bytes are let go of."""
        with self._lock:
            self._held -= size
        self._start()

    def close(self) -> None:
        """Start nothing more; fetches under way end in the background."""
        with self._lock:
            self._waiting.clear()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _start(self) -> None:
        with self._lock:
            while self._waiting and self._fits():
                self._held += self._largest
                self._threads.submit(self._run, *self._waiting.popleft())

    def _fits(self) -> bool:
        return self._held == 0 or self._held + self._largest <= self._budget

    def _run(self, uri: str, future: "Future[bytes]") -> None:
        try:
            data = self._fetch(uri)
        except BaseException as error:
            self.release(self._largest)
            future.set_exception(error)
            return
        self.release(self._largest - len(data))
        future.set_result(data)
