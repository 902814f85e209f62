"""Cluster records a worker keeps in memory, least recently used out first.

Owns the parsed prefixes of clusters: sequences, vectors, lengths. A record, once written, never
changes under one epoch, so a prefix stays true and only its tail is ever fetched. It must not know
Redis or routing.
"""

from collections import OrderedDict
from collections.abc import Hashable

import numpy as np
import numpy.typing as npt

from worker.errors import InfrastructureError
from worker.index.keys import CLUSTER, NEVER_READ, RECORD, State
from worker.vectors import DIMENSIONS, Vectors

LAYOUT = np.dtype([("sequence", "<u8"), ("vector", "i1", (DIMENSIONS,))])
ROW_BYTES = 8 + DIMENSIONS + 4
NO_PLACES: npt.NDArray[np.intp] = np.zeros(0, np.intp)
"""Of a prefix without deleted records; never written to."""


class Prefix:
    """The first records of one cluster, as of `state` (its 12 bytes in Redis)."""

    __slots__ = (
        "_inverse",
        "_sequences",
        "_vectors",
        "cluster",
        "dead",
        "inverse_lengths",
        "length",
        "sequences",
        "state",
        "vectors",
    )

    sequences: npt.NDArray[np.uint64]
    """Sequence of each record (n,); 0 where it was deleted."""
    vectors: Vectors
    """Vector of each record (n, 128)."""
    inverse_lengths: npt.NDArray[np.float32]
    """One over the length of each vector (n,), and 1 for a deleted one."""
    dead: npt.NDArray[np.intp]
    """Places of the deleted records."""

    def __init__(self, cluster: int) -> None:
        self.cluster = CLUSTER.pack(cluster)
        self.state = NEVER_READ
        self.dead = NO_PLACES
        self._sequences: npt.NDArray[np.uint64] = np.zeros(0, np.uint64)
        self._vectors: Vectors = np.zeros((0, DIMENSIONS), np.int8)
        self._inverse: npt.NDArray[np.float32] = np.zeros(0, np.float32)
        self._show(0)

    def _show(self, length: int) -> None:
        """Say how many records are true; every comparison asks for them, so they are kept cut."""
        self.length = length
        self.sequences = self._sequences[:length]
        self.vectors = self._vectors[:length]
        self.inverse_lengths = self._inverse[:length]

    @property
    def size(self) -> int:
        """Bytes held, spare room included."""
        return len(self._sequences) * ROW_BYTES

    @property
    def epoch(self) -> bytes:
        """The epoch the records belong to."""
        return self.state[:4]

    def covers(self, state: bytes) -> bool:
        """Whether all records of a state are held, in the same epoch."""
        return state[:4] == self.epoch and state[4:8] <= self.state[4:8]  # both big-endian

    def extend(self, state: bytes, first: int, packed: bytes) -> None:
        """Take over records `first`… of a reply; what is known already is skipped.

        Raises ValueError when the reply does not join what is here, and InfrastructureError when it
        is not all that the state counts.
        """
        count = len(packed) // RECORD
        if first + count != State.unpack(state).length:
            raise InfrastructureError(
                f"the index is damaged: records of cluster {CLUSTER.unpack(self.cluster)[0]} are "
                "missing; see `python -m worker fsck`"
            )
        if state[:4] != self.epoch:
            self.dead = NO_PLACES
            self._show(0)
        if first > self.length:
            raise ValueError(f"records from {first} do not join a prefix of {self.length}")
        if first + count < self.length:
            return
        if first + count > self.length:
            self._append(np.frombuffer(packed, LAYOUT)[self.length - first :])
        self.state = state  # last: it says what is held

    def _append(self, records: npt.NDArray[np.void]) -> None:
        self._make_room(self.length + len(records))
        fresh = slice(self.length, self.length + len(records))
        self._sequences[fresh] = records["sequence"]
        self._vectors[fresh] = records["vector"]
        wide = records["vector"].astype(np.float32)  # whole numbers below 2^24: exact
        self._inverse[fresh] = 1 / np.sqrt(np.maximum(np.einsum("ij,ij->i", wide, wide), 1))
        if not records["sequence"].all():
            dead = self.length + np.flatnonzero(records["sequence"] == 0)
            self.dead = np.concatenate([self.dead, dead])
        self._show(self.length + len(records))

    def _make_room(self, length: int) -> None:
        if length <= len(self._sequences):
            return
        room = length + max(8, length // 8)
        for name in ("_sequences", "_vectors", "_inverse"):
            old = getattr(self, name)
            new = np.zeros((room, *old.shape[1:]), old.dtype)
            new[: self.length] = old[: self.length]
            setattr(self, name, new)


class Cache:
    """Prefixes by cluster; `trim` drops the least recently used above the limit.

    Nothing is dropped while a batch is compared: the batch trims when it is done.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._prefixes: OrderedDict[Hashable, Prefix] = OrderedDict()
        self.size = 0

    def __len__(self) -> int:
        return len(self._prefixes)

    def get(self, space: Hashable, cluster: int) -> Prefix:
        """Return a cluster's prefix, an empty one when it is not held; it is now the freshest."""
        key = (space, cluster)
        prefix = self._prefixes.get(key)
        if prefix is None:
            prefix = self._prefixes[key] = Prefix(cluster)
        else:
            self._prefixes.move_to_end(key)
        return prefix

    def extend(self, prefix: Prefix, state: bytes, first: int, packed: bytes) -> None:
        """Add records to a prefix that `get` gave."""
        before = prefix.size
        prefix.extend(state, first, packed)
        self.size += prefix.size - before

    def drop(self, space: Hashable, cluster: int) -> None:
        """Forget one cluster."""
        prefix = self._prefixes.pop((space, cluster), None)
        if prefix is not None:
            self.size -= prefix.size

    def trim(self) -> None:
        """Drop the least recently used clusters until the limit holds."""
        while self.size > self._limit:
            _, prefix = self._prefixes.popitem(last=False)
            self.size -= prefix.size
