"""Fetching in threads, in order, with a bound on the bytes held.

Knows uris and bytes; not events, not what is done with the images.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from threading import Condition, Thread

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
        self._concurrency = concurrency
        self._budget = budget
        self._largest = largest
        self._changed = Condition()
        self._threads = 0
        self._held = 0
        self._waiting: deque[tuple[str, Future[bytes]]] = deque()
        self._closed = False

    def submit(self, uri: str) -> "Future[bytes]":
        """The bytes of `uri` to come, or what its fetch raised."""
        future: Future[bytes] = Future()
        with self._changed:
            if self._threads < self._concurrency:
                # A pool's own threads would have the process wait, at its end, for what hangs.
                Thread(target=self._work, name=f"fetch_{self._threads}", daemon=True).start()
                self._threads += 1
            self._waiting.append((uri, future))
            self._changed.notify()
        return future

    def release(self, size: int) -> None:
        """`size` fetched bytes are let go of."""
        with self._changed:
            self._held -= size
            self._changed.notify(1 + size // self._largest)  # no more can fit for that

    def close(self) -> None:
        """Start nothing more; fetches under way end in the background, or with the process."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()

    def _work(self) -> None:
        show_name()
        while begun := self._begin():
            self._run(*begun)

    def _begin(self) -> "tuple[str, Future[bytes]] | None":
        """The next fetch, once it may start; nothing when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or (self._waiting and self._fits()))
            if self._closed:
                return None
            self._held += self._largest
            return self._waiting.popleft()

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
