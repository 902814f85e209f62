"""The log of centroids replayed from what is left of it, to be compared with the table.

Owns the reading of its entries for that. It must not know why tables differ.
"""

from dataclasses import dataclass, field

from worker.index.keys import ADDED, CENTROID, CLUSTER, Keys
from worker.index.store import Store

PAGE = 1000
"""Entries read at once."""


@dataclass
class Log:
    """What the log leaves: `whole` where it begins with the first version."""

    version: int = 0
    whole: bool = True
    added: dict[int, bytes] = field(default_factory=dict)
    retired: set[int] = field(default_factory=set)
    lately: set[int] = field(default_factory=set)

    def apply(self, version: int, retired: list[int], added: dict[int, bytes]) -> None:
        """Follow one entry."""
        self.whole &= version == self.version + 1
        self.version = version
        self.retired.update(retired)
        for cluster in retired:
            self.added.pop(cluster, None)
        self.added.update(added)


def replay(store: Store, keys: Keys, since: int) -> Log:
    """Follow the log to its end; the clusters changed after version `since` are those `lately`."""
    log = Log()
    while entries := store.command("XRANGE", keys.log, f"({log.version}-1", "+", "COUNT", PAGE):
        for name, fields in entries:
            packed = fields[b"added"]
            parts = [packed[at : at + ADDED] for at in range(0, len(packed), ADDED)]
            added = {CLUSTER.unpack_from(part)[0]: part[-CENTROID:] for part in parts}
            retired = [cluster for (cluster,) in CLUSTER.iter_unpack(fields[b"retired"])]
            log.apply(int(name.split(b"-")[0]), retired, added)
            if log.version > since:
                log.lately.update(retired, added)
    return log
