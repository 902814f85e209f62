"""One round of placing a batch: route, bring the cache up, run the scripts, compare.

Owns the rule that an answer rests on what one script saw at one instant: an arrival is compared
only when the prefixes held are those its script saw, and asked again otherwise. It must not know
how often it is repeated.
"""

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from worker.index.answers import Answer, Arrival, IndexSettings, Neighbour
from worker.index.cache import Cache, Prefix
from worker.index.centroids import Route
from worker.index.comparing import Found, Match, Query, compare
from worker.index.keys import CLUSTER, DIGEST, RECORD, Keys, State, digest
from worker.index.space import Space
from worker.index.splitting import Maintainer
from worker.index.store import Argument, Store
from worker.vectors import Vectors

LOADED_AT_ONCE = 64
"""Clusters fetched in one pipeline: at most some 10 MB on the way."""
ROW = 160
"""Bytes of cache a record takes, spare room included; only to keep a part within the cache."""

HEADER = struct.Struct(">BB16s16sIHIIII")
TAIL = struct.Struct(">I12sII")
"""What goes to the `arrive` script and what comes back; see there."""

Names = Callable[[str, Iterable[int]], dict[int, str]]


@dataclass(frozen=True)
class Reply:
    """The answer of the `arrive` script; see there."""

    outcome: str
    version: int
    sequence: int
    text: bytes
    origin: int
    tails: bytes

    @classmethod
    def of(cls, raw: Sequence[Any]) -> "Reply":
        """Read the list the script returns."""
        return cls(raw[0].decode(), *raw[1:])

    def each_tail(self) -> Iterator[tuple[int, bytes, int, bytes]]:
        """Cluster, state, index of the first record, records."""
        at = 0
        while at < len(self.tails):
            cluster, state, first, count = TAIL.unpack_from(self.tails, at)
            end = at + TAIL.size + count * RECORD
            yield cluster, state, first, self.tails[at + TAIL.size : end]
            at = end


@dataclass(frozen=True)
class Routed:
    """An arrival and where it goes."""

    arrival: Arrival
    vector: Vectors
    route: Route


@dataclass(frozen=True)
class Told:
    """What its script said to an arrival, and the cluster states that rests on."""

    routed: Routed
    reply: Reply
    states: dict[int, bytes]


class Placing:
    """Places batches; used by one thread."""

    def __init__(
        self, store: Store, settings: IndexSettings, maintainer: Maintainer, names: Names
    ) -> None:
        self._store, self._settings = store, settings
        self._maintainer, self._names = maintainer, names
        self.cache = Cache(settings.cache_bytes)

    def round(
        self, space: Space, arrivals: Sequence[Arrival]
    ) -> tuple[list[Answer | bool | None], bool]:
        """Ask once for each arrival of a namespace.

        Answers each with its Answer, or False where it is to be asked again; then whether the
        generation has stopped answering.
        """
        vectors = np.stack([arrival.vector for arrival in arrivals if arrival.vector is not None])
        routes = space.table.route(vectors, self._settings.probes, self._settings.probe_margin)
        routed = [Routed(*each) for each in zip(arrivals, vectors, routes, strict=True)]
        answers: list[Answer | bool | None] = []
        stale = False
        for part in self._parts(routed):
            told = self._ask(space, part)
            answers += self._conclude(space, told) if told else [False] * len(part)
            stale |= any(each.reply.outcome == "stale" for each in told)
            self._catch_up(space, told)
            self.cache.trim()
        return answers, stale

    def _parts(self, routed: list[Routed]) -> Iterable[list[Routed]]:
        """Split a batch so that the clusters of each part fit into the cache together."""
        most = self._settings.cache_bytes // (self._settings.cluster_limit * ROW)
        part: list[Routed] = []
        clusters: set[int] = set()
        for each in routed:
            clusters.update(each.route.clusters)
            if part and len(clusters) > most:
                yield part
                part, clusters = [], set(each.route.clusters)
            part.append(each)
        yield part

    def _ask(self, space: Space, routed: list[Routed]) -> list[Told]:
        """Run the scripts; nothing when a cluster was gone before, the table then refreshed."""
        clusters = {cluster for each in routed for cluster in each.route.clusters}
        missing = [c for c in clusters if self._prefix(space, c).epoch == 0]
        if not self._fetch(space, missing):
            space.table.refresh()
            return []
        states = [
            {cluster: self._prefix(space, cluster).state for cluster in each.route.clusters}
            for each in routed
        ]
        calls = [
            (space.keys, arguments(each.arrival, self._settings, held))
            for each, held in zip(routed, states, strict=True)
        ]
        told = []
        raws = self._store.scripts("arrive", calls)
        for each, held, raw in zip(routed, states, raws, strict=True):
            reply = Reply.of(raw)
            for cluster, state, first, records in reply.each_tail():
                held[cluster] = state
                self.cache.extend((space.keys.prefix, cluster), state, first, records)
            told.append(Told(each, reply, held))
        return told

    def _prefix(self, space: Space, cluster: int) -> Prefix:
        return self.cache.get((space.keys.prefix, cluster))

    def _fetch(self, space: Space, clusters: Sequence[int]) -> bool:
        """Bring prefixes up to date; False when a cluster is retired."""
        alive = True
        for start in range(0, len(clusters), LOADED_AT_ONCE):
            part = clusters[start : start + LOADED_AT_ONCE]
            calls: list[tuple[Keys, list[Argument]]] = [
                (space.keys, [CLUSTER.pack(c), self._prefix(space, c).state]) for c in part
            ]
            for cluster, raw in zip(part, self._store.scripts("read", calls), strict=True):
                if raw:
                    self.cache.extend((space.keys.prefix, cluster), *raw)
                else:
                    alive = False
                    self.cache.drop((space.keys.prefix, cluster))
        return alive

    def _conclude(self, space: Space, told: list[Told]) -> list[Answer | bool | None]:
        """Compare the arrivals whose script answered everything, in one go."""
        whole = [each for each in told if self._answered_at_one_instant(space, each)]
        found = compare(
            [self._query(space, each) for each in whole],
            self._settings.threshold,
            self._settings.matches,
        )
        listed = {match.sequence for each in found for match in _listed(each)}
        names = self._names(space.keys.namespace, listed)
        answered = {
            id(each): _placed(each, one, names) for each, one in zip(whole, found, strict=True)
        }
        return [answered.get(id(each), _unless_unknown(each)) for each in told]

    def _answered_at_one_instant(self, space: Space, told: Told) -> bool:
        """Whether the prefixes held are those the script saw.

        A later arrival of the same batch may have brought a newer epoch, in which a record has
        moved to a cluster that was read before it came there.
        """
        return told.reply.outcome in ("placed", "again") and all(
            self._prefix(space, cluster).epoch == State.unpack(state).epoch
            for cluster, state in told.states.items()
        )

    def _query(self, space: Space, told: Told) -> Query:
        prefixes = [self._prefix(space, cluster) for cluster in told.routed.route.clusters]
        vector = told.routed.vector
        if told.reply.outcome == "again":
            # Answer for the vector stored then: another machine may have embedded it.
            for prefix in prefixes:
                here = np.flatnonzero(prefix.sequences == told.reply.sequence)
                if len(here):
                    vector = prefix.vectors[here[0]].copy()
                    break
        return Query(vector, prefixes, told.reply.sequence, told.reply.origin)

    def _catch_up(self, space: Space, told: list[Told]) -> None:
        """After a round: split what was full, load what was behind, follow the log."""
        replies = [each.reply for each in told]
        for reply in replies:
            if reply.outcome == "full":
                self._maintainer.work_on(space, CLUSTER.unpack(reply.text)[0])
        behind = {
            cluster
            for each in told
            if each.reply.outcome == "behind"
            for cluster in each.routed.route.clusters
        }
        self._fetch(space, sorted(behind))
        moved = any(reply.outcome in ("moved", "full") for reply in replies)
        if moved or any(reply.version > space.table.version for reply in replies):
            space.table.refresh()


def arguments(
    arrival: Arrival, settings: IndexSettings, states: dict[int, bytes] | None = None
) -> list[Argument]:
    """The arguments of the `arrive` script.

    `states` holds the probed clusters, home first; without it the arrival is only recognised.
    """
    probed = states or {}
    partition, offset = arrival.position
    header = HEADER.pack(
        bool(probed),
        arrival.store,
        digest(arrival.image_id),
        arrival.sha256[:DIGEST],
        partition,
        offset >> 32,
        offset & 0xFFFFFFFF,
        settings.tail_records,
        settings.cluster_limit,
        settings.hard_limit,
    )
    vector = arrival.vector.tobytes() if arrival.vector is not None and probed else b""
    probes = b"".join([CLUSTER.pack(cluster) + state for cluster, state in probed.items()])
    return [arrival.image_id, header, vector, probes]


def known(reply: Reply, arrival: Arrival) -> Answer | None:
    """The answer where nothing needs to be compared, else None."""
    sequence = reply.sequence if arrival.store else None
    if reply.outcome == "seen":
        return Answer("seen", sequence, verdict=reply.text)
    if reply.outcome == "conflict":
        return Answer("conflict", sequence)
    if reply.outcome == "exact":
        origin = Neighbour(reply.text.decode(), reply.origin, 1.0)
        return Answer("exact", sequence, exact_of=origin)
    return None


def _unless_unknown(told: Told) -> Answer | bool:
    answer = known(told.reply, told.routed.arrival)
    return False if answer is None else answer


def _listed(found: Found) -> list[Match]:
    return [match for match in (found.earliest, found.best, *found.matches) if match]


def _placed(told: Told, found: Found, names: dict[int, str]) -> Answer:
    def neighbour(match: Match | None) -> Neighbour | None:
        if match is None:
            return None
        return Neighbour(names[match.sequence], match.sequence, match.similarity)

    return Answer(
        "placed",
        told.reply.sequence if told.routed.arrival.store else None,
        earliest=neighbour(found.earliest),
        best=neighbour(found.best),
        matches=tuple(each for match in found.matches if (each := neighbour(match))),
        clusters_probed=len(told.routed.route.clusters),
        vectors_compared=found.compared,
        truncated=told.routed.route.truncated,
    )
