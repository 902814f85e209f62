"""What one pass of `fsck` over one generation knows, and what it found that does not hold.

Owns the counters, what is remembered of each sequence, and the problems. It reads only, and must
not know what is checked.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from worker.index.keys import Keys
from worker.index.store import Store

UNKNOWN = 255
"""Kind of a sequence whose record was not found."""
DIGITS = 19
"""Of a number that fits into 64 bits."""

Named = list[tuple[int, bytes]]
"""Sequences and something of each."""


@dataclass(frozen=True)
class Counters:
    """How far a generation had come when the pass began."""

    sequence: int
    version: int
    salt: bytes | None


class Notes:
    """One pass over one generation; `result` says in words what does not hold."""

    def __init__(self, store: Store, keys: Keys, counters: Counters) -> None:
        self.store, self.keys = store, keys
        self.last, self.version = counters.sequence, counters.version
        self._salt = counters.salt
        self._problems: list[str] = []
        self._later: dict[str, int] = {}  # problems, unless their sequence is handed out by now
        # For every sequence: the cluster its vector was found in, the kind of its record, the ends
        # of the digests of its bytes and its id, and that of the id that was followed back to it.
        self.found: npt.NDArray[np.uint32] = np.zeros(self.last + 1, np.uint32)
        self.kinds: npt.NDArray[np.uint8] = np.full(self.last + 1, UNKNOWN, np.uint8)
        self.shas: npt.NDArray[np.uint32] = np.zeros(self.last + 1, np.uint32)
        self.ids: npt.NDArray[np.uint32] = np.zeros(self.last + 1, np.uint32)
        self._lives: npt.NDArray[np.uint32] = np.zeros(self.last + 1, np.uint32)

    def say(self, *problems: str) -> None:
        """Note what does not hold."""
        self._problems += problems

    def say_unless_handed_out(self, problem: str, sequence: int) -> None:
        """Note what does not hold, but for a sequence that workers hand out during the pass."""
        self._later[problem] = sequence

    def result(self) -> list[str]:
        """All problems."""
        last = counter(self.store, self.keys, "sequence") or 0
        return self._problems + [each for each, at in self._later.items() if at > last]

    def is_one(self, kind: int, sequence: int, sha: bytes) -> bool:
        """Whether a sequence is of some kind and some bytes."""
        return bool(self.kinds[sequence] == kind and self.shas[sequence] == end(sha))

    def follow(self, sequence: int, mark: int) -> None:
        """Note that an id, told by its digest's end, was followed back to a life of it."""
        if sequence <= self.last:
            self._lives[sequence] = mark

    def followed(self, sequence: int, mark: int) -> bool:
        """Whether an id was followed back to a sequence."""
        return sequence <= self.last and bool(self._lives[sequence] == mark)

    def bucket(self, kind: str, digest: bytes, sequences: int) -> str:
        """The bucket (kind `id:` or `sha:`) of a digest after so many sequences."""
        return self.keys.lookup(kind, digest, sequences, self._salt)

    def look_up(self, kind: str, digests: list[bytes]) -> list[int | None]:
        """The sequences that digests lead to."""
        last = counter(self.store, self.keys, "sequence") or 0  # buckets grow beside workers
        asked = [("HGET", self.bucket(kind, each, last), each) for each in digests]
        return [number(value) for value in self.store.commands(asked)]


def counter(store: Store, keys: Keys, name: str) -> int | None:
    """A counter of a generation as it is now; None where it is no number."""
    return number(store.command("HGET", keys.meta, name))


def number(value: bytes | None) -> int | None:
    """The number in an entry; None where there is no entry, or no number in it."""
    return int(value) if value is not None and value.isdigit() and len(value) <= DIGITS else None


def end(digest: bytes) -> int:
    """The last four bytes: enough to tell entries apart that are wrong by accident."""
    return int.from_bytes(digest[-4:], "big")
