"""`python -m worker fsck`: check every invariant of the index.

Owns the list of what must hold in Redis, checked page by page. It reads only. It must not know how
the index came to be what it is.
"""

import argparse
import sys
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from worker import config
from worker.index.cache import LAYOUT
from worker.index.keys import (
    ADDED,
    CENTROID,
    CHUNK,
    CLUSTER,
    COPY,
    IMAGE,
    LIVE,
    LOAD,
    NAMESPACES,
    NEVER_READ,
    RECORD,
    SPAN,
    Keys,
    State,
    decode,
    digest,
)
from worker.index.store import Store
from worker.storage import connect

PAGE = 128
"""Buckets checked at once: up to 4,096 images, some MB."""
CLUSTERS = 32
"""Clusters read at once: 1 MB where they are as large as they should be."""

Named = list[tuple[int, bytes]]
"""Sequences and something of each."""


class Check:
    """One pass over one generation; `problems` says in words what does not hold."""

    def __init__(self, store: Store, keys: Keys) -> None:
        self._store, self._keys = store, keys
        self.problems: list[str] = []
        self.last = int(store.command("HGET", keys.meta, "sequence") or 0)
        self.states = {
            CLUSTER.unpack(cluster)[0]: State.unpack(state)
            for cluster, state in store.command("HGETALL", keys.clusters).items()
        }
        # For every sequence: the cluster its vector was found in.
        self._found: npt.NDArray[np.uint32] = np.zeros(self.last + 1, np.uint32)

    def run(self) -> list[str]:
        """Check everything; answers the problems."""
        self._check_centroids()
        clusters = list(self.states)
        for start in range(0, len(clusters), CLUSTERS):
            self._check_clusters(clusters[start : start + CLUSTERS])
        for first in range(0, self.last + 1, SPAN * PAGE):
            self._check_images(first)
        self._check_lookups()
        return self.problems

    def _say(self, problem: str) -> None:
        self.problems.append(problem)

    def _check_centroids(self) -> None:
        table = {
            CLUSTER.unpack(cluster)[0]: centroid
            for cluster, centroid in self._store.command("HGETALL", self._keys.centroids).items()
        }
        if table.keys() != self.states.keys():
            self._say(f"clusters without a state or centroid: {table.keys() ^ self.states.keys()}")
        version = self._check_log(table)
        if version != int(self._store.command("HGET", self._keys.meta, "version") or 0):
            self._say(f"the log ends at version {version}, the counter does not")
        due = {CLUSTER.unpack(c)[0] for c in self._store.command("SMEMBERS", self._keys.due)}
        if due - self.states.keys():
            self._say(f"retired clusters are due: {due - self.states.keys()}")

    def _check_log(self, table: dict[int, bytes]) -> int:
        """Replay the log, or what is left of it, against the table; answers its version."""
        added: dict[int, bytes] = {}
        retired: set[int] = set()
        version, whole = 0, True
        while entries := self._store.command(
            "XRANGE", self._keys.log, f"({version}-1", "+", "COUNT", 1000
        ):
            for name, fields in entries:
                current = int(name.split(b"-")[0])
                whole &= current == version + 1
                version = current
                for (cluster,) in CLUSTER.iter_unpack(fields[b"retired"]):
                    retired.add(cluster)
                    added.pop(cluster, None)
                for at in range(0, len(fields[b"added"]), ADDED):
                    entry = fields[b"added"][at : at + ADDED]
                    added[CLUSTER.unpack_from(entry)[0]] = entry[-CENTROID:]
        # Where old entries are trimmed, the table may hold clusters that are older than the log.
        held = table if whole else {c: table[c] for c in added.keys() & table.keys()}
        if held != added or retired & table.keys():
            self._say("the centroid table is not what its log says")
        return version

    def _check_clusters(self, clusters: list[int]) -> None:
        keys = self._keys
        raws = list(
            self._store.read_clusters(
                keys, [(CLUSTER.pack(cluster), NEVER_READ) for cluster in clusters]
            )
        )
        ends = [(cluster, -(-self.states[cluster].length // CHUNK)) for cluster in clusters]
        beyond = self._store.commands([("EXISTS", keys.chunk(*end)) for end in ends])
        for cluster, raw, more in zip(clusters, raws, beyond, strict=True):
            if more:
                self._say(f"cluster {cluster} has a chunk beyond its length")
            self._check_cluster(cluster, self.states[cluster], raw)

    def _check_cluster(
        self, cluster: int, state: State, raw: tuple[bytes, int, bytes] | None
    ) -> None:
        if raw is None or raw[0] != state.pack():
            self._say(f"cluster {cluster} changed while it was read")
            return
        if len(raw[2]) != state.length * RECORD:
            self._say(f"cluster {cluster} has {len(raw[2]) / RECORD} of {state.length} records")
            return
        records = np.frombuffer(raw[2], LAYOUT)
        sequences = records["sequence"][records["sequence"] > 0]
        if len(sequences) != state.live:
            self._say(f"cluster {cluster} has {len(sequences)} living records, says {state.live}")
        if len(np.unique(sequences)) != len(sequences):
            self._say(f"cluster {cluster} holds a sequence twice")
        if len(sequences) and int(sequences.max()) > self.last:
            self._say(f"cluster {cluster} holds a sequence never handed out")
            return
        if records["vector"][records["sequence"] == 0].any():
            self._say(f"cluster {cluster} keeps the vector of a deleted image")
        if self._found[sequences].any():
            self._say(f"cluster {cluster} holds a vector that another one holds, too")
        self._found[sequences] = cluster

    def _check_images(self, first: int) -> None:
        buckets = range(first // SPAN, min(first // SPAN + PAGE, self.last // SPAN + 1))
        replies = self._store.commands(
            [("HGETALL", self._keys.record(bucket * SPAN)[0]) for bucket in buckets]
        )
        records: Named = []
        names: Named = []
        for bucket, fields in zip(buckets, replies, strict=True):
            for offset in range(SPAN):
                sequence = bucket * SPAN + offset
                if not 0 < sequence <= self.last:
                    continue
                record, name = (fields.get(b"%d" % (offset * 4 + which)) for which in (0, 1))
                if record is None or name is None:
                    self._say(f"sequence {sequence} has no {'record' if record is None else 'id'}")
                if record is not None and name is not None:
                    records.append((sequence, record))
                if name is not None:
                    names.append((sequence, name))
        self._check_records(records)
        self._check_names(names)

    def _check_records(self, records: Named) -> None:
        originals: Named = []
        copies: Named = []
        for sequence, packed in records:
            kind, sha, _, _, _, _, home = IMAGE.unpack_from(packed)
            found = int(self._found[sequence])
            if kind == LIVE:
                originals.append((sequence, sha))
                if found != home:
                    self._say(f"sequence {sequence} says cluster {home}; it is in {found}")
            elif found:
                self._say(f"sequence {sequence} is no living original but has a vector in {found}")
            if kind == COPY:
                copies.append((sequence, sha))
        holders = self._lookup("sha:", [sha for _, sha in originals])
        for (sequence, _), holder in zip(originals, holders, strict=True):
            if holder != sequence:
                self._say(f"the bytes of sequence {sequence} lead to {holder}")
        lists = f"{self._keys.prefix}copies:".encode()
        scores = self._store.commands([("ZSCORE", lists + sha, each) for each, sha in copies])
        for (sequence, _), score in zip(copies, scores, strict=True):
            if score is None:
                self._say(f"copy {sequence} is not listed with its original")

    def _check_names(self, names: Named) -> None:
        """Each id leads to its last sequence, and from there back to all it had before."""
        latest = self._lookup("id:", [digest(name.decode()) for _, name in names])
        waiting = [(sequence, at) for (sequence, _), at in zip(names, latest, strict=True)]
        while waiting:
            on_the_way: list[tuple[int, int]] = []
            for sequence, at in waiting:
                if at is not None and at > sequence:
                    on_the_way.append((sequence, at))
                elif at != sequence:
                    self._say(f"the id of sequence {sequence} does not lead back to it")
            fields = [self._keys.record(at) for _, at in on_the_way]
            replies = self._store.commands([("HGET", key, first + 3) for key, first in fields])
            # It must lead back: a later one would lead round in a circle.
            waiting = [
                (sequence, int(reply) if reply is not None and int(reply) < at else None)
                for (sequence, at), reply in zip(on_the_way, replies, strict=True)
            ]

    def _lookup(self, kind: str, fields: list[bytes]) -> list[int | None]:
        values = self._store.commands(
            [("HGET", self._keys.lookup(kind, field, self.last), field) for field in fields]
        )
        return [int(value) if value else None for value in values]

    def _check_lookups(self) -> None:
        for kind in ("id:", "sha:"):
            for page in self._pages(kind):
                for bucket, entries in page:
                    for field, value in entries.items():
                        if self._keys.lookup(kind, field, self.last) != bucket:
                            self._say(f"{bucket} holds an entry of another bucket")
                        if not 0 < int(value) <= self.last:
                            self._say(f"{bucket} leads to sequence {int(value)}")

    def _pages(self, kind: str) -> Iterator[list[tuple[str, dict[bytes, bytes]]]]:
        count = self.last // LOAD + 1
        for start in range(0, count, PAGE):
            names = [
                f"{self._keys.prefix}{kind}{b}" for b in range(start, min(start + PAGE, count))
            ]
            replies = self._store.commands([("HGETALL", name) for name in names])
            yield list(zip(names, replies, strict=True))


def check(store: Store, namespace: str) -> list[str]:
    """Check the generation of a namespace that answers; [] when everything holds.

    On a namespace in use what is found may be a change in progress: then it is looked at again.
    """
    root = Keys(namespace, "").root
    for _ in range(3):
        serving = store.command("HGET", root, "serving")
        if serving is None:
            return [f"namespace {namespace!r} does not exist"]
        keys = Keys(namespace, serving.decode())
        before = store.command("HGETALL", keys.meta), store.command("HGETALL", keys.clusters)
        problems = Check(store, keys).run()
        after = store.command("HGETALL", keys.meta), store.command("HGETALL", keys.clusters)
        if not problems or before == after:
            break
    return problems


def main(argv: list[str]) -> int:
    """Check one namespace or all; exit status 1 when something does not hold."""
    parser = argparse.ArgumentParser(prog="python -m worker fsck", description=__doc__)
    parser.add_argument("--namespace", help="only this one (default: all)")
    config.add_flags(parser, config.RedisSettings)
    args = parser.parse_args(argv)
    store = Store(connect(config.from_flags(config.RedisSettings, args)))
    names = [decode(name.decode()) for name in store.command("SMEMBERS", NAMESPACES)]
    bad = 0
    for namespace in [args.namespace] if args.namespace else sorted(names):
        problems = check(store, namespace)
        bad += len(problems)
        for problem in problems:
            print(f"{namespace}: {problem}", file=sys.stderr)
        print(f"{namespace}: {len(problems) or 'no'} problems")
    return 1 if bad else 0
