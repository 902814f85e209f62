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
    odd: list[str] = field(default_factory=list)
    """Names of what is no entry."""

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
    start = "-"
    while entries := store.command("XRANGE", keys.log, start, "+", "COUNT", PAGE):
        for name, fields in entries:
            _follow(log, name.decode(), fields, since)
        start = f"({name.decode()}"
    return log


def _follow(log: Log, name: str, fields: dict[bytes, bytes], since: int) -> None:
    version, _, part = name.partition("-")
    # Without one of them it is none either: a byte is no whole number of clusters.
    gone, come = fields.get(b"retired", b"?"), fields.get(b"added", b"?")
    if part != "1" or len(gone) % CLUSTER.size or len(come) % ADDED:
        log.odd.append(name)
        return
    parts = [come[at : at + ADDED] for at in range(0, len(come), ADDED)]
    added = {CLUSTER.unpack_from(each)[0]: each[-CENTROID:] for each in parts}
    retired = [cluster for (cluster,) in CLUSTER.iter_unpack(gone)]
    log.apply(int(version), retired, added)
    if log.version > since:
        log.lately.update(retired, added)
