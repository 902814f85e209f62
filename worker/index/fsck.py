"""`python -m worker fsck`: check every invariant of the index.

Owns the list of what must hold in Redis, checked page by page. It reads only. Beside workers a pass
sees changes half done: what it finds counts once other passes have found it, too, so its words say
nothing that goes on changing. It must not know how the index came to be what it is.
"""

import argparse
import sys
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from worker import flags
from worker.arguments import nonempty
from worker.connections import RedisSettings
from worker.index.cache import LAYOUT
from worker.index.centroid_log import replay
from worker.index.former import past, unremembered
from worker.index.keys import (
    CENTROID,
    CLUSTER,
    COPY,
    IMAGE,
    LIVE,
    LOAD,
    NAMESPACES,
    NEVER_READ,
    RECORD,
    SPAN,
    STATE,
    Keys,
    State,
    decode,
    digest,
)
from worker.index.space import exists
from worker.index.store import Store
from worker.index.strays import strays
from worker.storage import connect

PAGE = 128
"""Buckets checked at once: up to 4,096 images, some MB."""
CLUSTERS = 32
"""Clusters read at once: 1 MB where they are as large as they should be."""

PASSES = 3
"""A finding is reported when each of so many passes has it."""
UNKNOWN = 255
"""Kind of a sequence whose record was not found."""

Named = list[tuple[int, bytes]]
"""Sequences and something of each."""


class Check:
    """One pass over one generation; `problems` says in words what does not hold."""

    def __init__(self, store: Store, keys: Keys) -> None:
        self._store, self._keys = store, keys
        self.problems: list[str] = []
        self._later: dict[str, int] = {}  # problems, unless their sequence is handed out by now
        self._version = int(store.command("HGET", keys.meta, "version") or 0)
        self.last = self._sequence()
        self._salt = store.command("HGET", keys.meta, "salt")
        self.states = {
            number: State.unpack(state)
            for number, state in self._table(keys.clusters, STATE.size).items()
        }
        # For every sequence: the cluster its vector was found in, the kind of its record, and the
        # ends of the digests of its bytes and its id.
        self._found: npt.NDArray[np.uint32] = np.zeros(self.last + 1, np.uint32)
        self._kinds: npt.NDArray[np.uint8] = np.full(self.last + 1, UNKNOWN, np.uint8)
        self._shas: npt.NDArray[np.uint32] = np.zeros(self.last + 1, np.uint32)
        self._ids: npt.NDArray[np.uint32] = np.zeros(self.last + 1, np.uint32)

    def run(self) -> list[str]:
        """Check everything; answers the problems."""
        self._check_centroids()
        clusters = list(self.states)
        for start in range(0, len(clusters), CLUSTERS):
            self._check_clusters(clusters[start : start + CLUSTERS])
        for first in range(0, self.last + 1, SPAN * PAGE):
            self._check_images(first)
        self._check_lookups()
        self._check_keys()
        last = self._sequence()
        self.problems += [problem for problem, each in self._later.items() if each > last]
        return self.problems

    def _say(self, problem: str) -> None:
        self.problems.append(problem)

    def _sequence(self) -> int:
        return int(self._store.command("HGET", self._keys.meta, "sequence") or 0)

    def _table(self, key: str, size: int) -> dict[int, bytes]:
        """By cluster what a hash holds, where that is of its size."""
        found = self._store.command("HGETALL", key)
        whole = {
            CLUSTER.unpack(cluster)[0]: value
            for cluster, value in found.items()
            if (len(cluster), len(value)) == (CLUSTER.size, size)
        }
        if len(whole) < len(found):
            self._say(f"{key} has entries of a wrong size")
        return whole

    def _check_centroids(self) -> None:
        table = self._table(self._keys.centroids, CENTROID)
        members = self._store.command("SMEMBERS", self._keys.due)
        due = {CLUSTER.unpack(each)[0] for each in members if len(each) == CLUSTER.size}
        if len(due) < len(members):
            self._say("upkeep is due for what is no cluster")
        log = replay(self._store, self._keys, self._version)
        counted = int(self._store.command("HGET", self._keys.meta, "version") or 0)
        if not self._version <= log.version <= counted:
            self._say("the log ends at another version than the counter says")
        for cluster in (table.keys() ^ self.states.keys()) - log.lately:
            self._say(f"cluster {cluster} is without a state or centroid")
        for cluster in due - self.states.keys() - log.lately:
            self._say(f"cluster {cluster} is retired, and upkeep is due")
        table = {c: centroid for c, centroid in table.items() if c not in log.lately}
        added = {c: centroid for c, centroid in log.added.items() if c not in log.lately}
        # Where old entries are trimmed, the table may hold clusters that are older than the log.
        held = table if log.whole else {c: table[c] for c in added.keys() & table.keys()}
        if held != added or log.retired & table.keys():
            self._say("the centroid table is not what its log says")

    def _check_clusters(self, clusters: list[int]) -> None:
        held = [(CLUSTER.pack(cluster), NEVER_READ) for cluster in clusters]
        raws = self._store.read_clusters(self._keys, held)
        for cluster, raw in zip(clusters, raws, strict=True):
            if raw is not None:  # else it was retired since the pass began
                self._check_cluster(cluster, State.unpack(raw[0]), raw[2])

    def _check_cluster(self, cluster: int, state: State, packed: bytes) -> None:
        if len(packed) != state.length * RECORD:
            self._say(f"cluster {cluster} has not as many records as it says")
            return
        records = np.frombuffer(packed, LAYOUT)
        sequences = records["sequence"][records["sequence"] > 0]
        if len(sequences) != state.live:
            self._say(f"cluster {cluster} has not as many living records as it says")
        if len(np.unique(sequences)) != len(sequences):
            self._say(f"cluster {cluster} holds a sequence twice")
        if records["vector"][records["sequence"] == 0].any():
            self._say(f"cluster {cluster} keeps the vector of a deleted image")
        if len(sequences) and (highest := int(sequences.max())) > self.last:
            self._later[f"cluster {cluster} holds a sequence never handed out"] = highest
        sequences = sequences[sequences <= self.last]
        for sequence in sequences[self._found[sequences] > 0]:
            other = self._found[sequence]
            self._say(f"cluster {cluster} holds sequence {sequence}, which is in {other}, too")
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
                record, name, *_ = (fields.pop(b"%d" % (offset * 4 + at), None) for at in range(4))
                if record is None or name is None:
                    self._say(f"sequence {sequence} has no {'record' if record is None else 'id'}")
                if record is not None and name is not None:
                    records.append((sequence, record))
                if name is not None:
                    names.append((sequence, name))
            self._check_rest(bucket, fields)
        self._check_records(records)
        former = self._check_names(names)
        self.problems += unremembered(self._store, self._keys, former, dict(records))

    def _check_rest(self, bucket: int, fields: dict[bytes, bytes]) -> None:
        """Fields that are of no sequence handed out; at the end they may be of the next ones."""
        for name in fields:
            at = int(name) // 4 if name.isdigit() else SPAN
            problem = f"bucket {bucket} of records has a field {name!r} of no sequence"
            if at < SPAN and (sequence := bucket * SPAN + at) > 0:
                self._later[problem] = sequence
            else:
                self._say(problem)

    def _check_records(self, records: Named) -> None:
        originals: Named = []
        copies: Named = []
        for sequence, packed in records:
            if len(packed) < IMAGE.size:  # that of a deleted image has its delete behind it
                self._say(f"the record of sequence {sequence} has {len(packed)} bytes")
                continue
            kind, sha, _, _, _, _, home = IMAGE.unpack_from(packed)
            self._kinds[sequence], self._shas[sequence] = kind, _end(sha)
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

    def _check_names(self, names: Named) -> Named:
        """Each id leads to its last sequence, and from there back to all it had before.

        Answers those that are not the last of their id, and the id's digest.
        """
        digests = [digest(name.decode(errors="replace")) for _, name in names]
        self._ids[[sequence for sequence, _ in names]] = [_end(each) for each in digests]
        latest = self._lookup("id:", digests)
        waiting = [(sequence, at) for (sequence, _), at in zip(names, latest, strict=True)]
        former = [
            (sequence, each)
            for (sequence, at), each in zip(waiting, digests, strict=True)
            if at is not None and at > sequence
        ]
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
                (sequence, back if back is not None and back < at else None)
                for (sequence, at), reply in zip(on_the_way, replies, strict=True)
                for back in (_number(reply),)
            ]
        return former

    def _lookup(self, kind: str, fields: list[bytes]) -> list[int | None]:
        last = self._sequence()  # the buckets grow beside workers
        values = self._store.commands(
            [("HGET", self._keys.lookup(kind, each, last, self._salt), each) for each in fields]
        )
        return [_number(value) for value in values]

    def _check_lookups(self) -> None:
        for kind in ("id:", "sha:"):
            for page in self._pages(kind):
                for bucket, entries in page:
                    for name, value in entries.items():
                        if self._keys.lookup(kind, name, self.last, self._salt) != bucket:
                            self._say(f"{bucket} holds an entry of another bucket")
                        self._check_entry(kind, bucket, name, value)

    def _check_entry(self, kind: str, bucket: str, name: bytes, value: bytes) -> None:
        sequence = _number(value)
        problem = f"{bucket} leads to sequence {value.decode(errors='backslashreplace')}"
        if sequence is None:
            self._say(problem)
        elif sequence > self.last:
            self._later[problem] = sequence
        elif sequence < 1:
            self._say(problem)
        elif kind == "id:" and self._ids[sequence] != _end(name):
            self._say(f"{problem}, which has another id")
        elif kind == "sha:" and not self._is(LIVE, sequence, name):
            self._say(f"{problem}, which is no living original of these bytes")

    def _is(self, kind: int, sequence: int, sha: bytes) -> bool:
        return bool(self._kinds[sequence] == kind and self._shas[sequence] == _end(sha))

    def _check_keys(self) -> None:
        lists = f"{self._keys.prefix}copies:".encode()
        for page in self._store.pages(self._keys.prefix):
            for name in strays(self._store, self._keys, page):
                self._say(f"{name.decode(errors='replace')} belongs to nothing that is stored")
            self._check_copies(
                [(name, name[len(lists) :]) for name in page if name.startswith(lists)]
            )
            for sequence, each, problem in past(self._store, self._keys, page):
                if sequence > self.last:
                    self._later[problem] = sequence
                elif self._ids[sequence] != _end(each):
                    self._say(problem)

    def _check_copies(self, lists: list[tuple[bytes, bytes]]) -> None:
        """Each list of copies, named by their bytes, holds only those."""
        replies = self._store.commands([("ZRANGE", name, 0, -1) for name, _ in lists])
        for (_, sha), members in zip(lists, replies, strict=True):
            for member in members:
                sequence = _number(member)
                told = member.decode(errors="backslashreplace")
                problem = f"sequence {told} is listed as a copy of bytes it has not"
                if sequence is None:
                    self._say(problem)
                elif sequence > self.last:
                    self._later[problem] = sequence
                elif not self._is(COPY, sequence, sha):
                    self._say(problem)

    def _pages(self, kind: str) -> Iterator[list[tuple[str, dict[bytes, bytes]]]]:
        count = self.last // LOAD + 1
        for start in range(0, count, PAGE):
            names = [
                f"{self._keys.prefix}{kind}{b}" for b in range(start, min(start + PAGE, count))
            ]
            replies = self._store.commands([("HGETALL", name) for name in names])
            yield list(zip(names, replies, strict=True))


def _number(value: bytes | None) -> int | None:
    """The sequence an entry leads to; None where there is no entry, or no number in it."""
    return int(value) if value is not None and value.isdigit() else None


def _end(sha: bytes) -> int:
    """The last four bytes: enough to tell entries apart that are wrong by accident."""
    return int.from_bytes(sha[-4:], "big")


def check(store: Store, namespace: str) -> list[str]:
    """Check what answers and what is being built; [] when everything holds.

    On a namespace in use one pass may find changes in progress: only what all passes find counts.
    """
    found = _findings(store, namespace)
    for _ in range(PASSES - 1):
        if found:
            again = set(_findings(store, namespace))
            found = [each for each in found if each in again]
    return found


def _findings(store: Store, namespace: str) -> list[str]:
    root = Keys(namespace, "").root
    serving, building = store.command("HMGET", root, "serving", "building")
    if serving is None:
        return [f"namespace {namespace!r} does not exist"]
    found = Check(store, Keys(namespace, serving.decode())).run()
    if building is not None:
        keys = Keys(namespace, building.decode())
        found += [f"being built: {problem}" for problem in Check(store, keys).run()]
    return found


def main(argv: list[str]) -> int:
    """Check one namespace or all; exit status 1 when something does not hold."""
    parser = argparse.ArgumentParser(prog="python -m worker fsck", description=__doc__)
    parser.add_argument("--namespace", type=nonempty, help="only this one (default: all)")
    flags.add_flags(parser, RedisSettings)
    args = parser.parse_args(argv)
    store = Store(connect(flags.from_flags(RedisSettings, args)))
    names = [decode(name.decode()) for name in store.command("SMEMBERS", NAMESPACES)]
    # The name is noted first: of one whose making was cut short there is nothing else.
    names = [args.namespace] if args.namespace else [n for n in sorted(names) if exists(store, n)]
    if not names:
        print("no namespace is known")
    bad = 0
    for namespace in names:
        problems = check(store, namespace)
        bad += len(problems)
        for problem in problems:
            print(f"{namespace}: {problem}", file=sys.stderr)
        print(f"{namespace}: {len(problems) or 'no'} problems")
    return 1 if bad else 0
