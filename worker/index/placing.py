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
from worker.index.keys import CLUSTER, DIGEST, NEVER_READ, RECORD, Keys, digest
from worker.index.space import Space
from worker.index.splitting import Maintainer
from worker.index.store import Argument, Store
from worker.vectors import Vectors

LOADED_AT_ONCE = 64
"""Clusters fetched in one pipeline: at most some 10 MB on the way."""
ROW = 160
"""Bytes of cache a record takes, spare room included; only to keep a part within the cache."""

HEADER = struct.Struct(">BB16s16sIHIIII")
TAIL = struct.Struct(">4s12sII")
"""What goes to the `arrive` script and what comes back; see there."""

Names = Callable[[Space, set[int]], dict[int, str] | None]


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

    def each_tail(self) -> Iterator[tuple[bytes, bytes, int, bytes]]:
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
    prefixes: list[Prefix]


@dataclass(frozen=True)
class Told:
    """What its script said to an arrival, and the epochs of the prefixes that rests on."""

    routed: Routed
    reply: Reply
    epochs: list[bytes]


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
        answers: list[Answer | bool | None] = []
        stale = False
        for part in self._parts(routes):
            routed = [
                Routed(arrivals[at], vectors[at], routes[at], self._prefixes(space, routes[at]))
                for at in part
            ]
            told = self._ask(space, routed)
            answers += self._conclude(space, told)
            stale |= any(each.reply.outcome == "stale" for each in told)
            self._catch_up(space, told)
            self.cache.trim()
        return answers, stale

    def _parts(self, routes: list[Route]) -> Iterable[list[int]]:
        """Split a batch so that the clusters of each part fit into the cache together."""
        most = self._settings.cache_bytes // (self._settings.cluster_limit * ROW)
        part: list[int] = []
        clusters: set[int] = set()
        for at, route in enumerate(routes):
            clusters.update(route.clusters)
            if part and len(clusters) > most:
                yield part
                part, clusters = [], set(route.clusters)
            part.append(at)
        yield part

    def _prefixes(self, space: Space, route: Route) -> list[Prefix]:
        return [self.cache.get(space.keys.origin, cluster) for cluster in route.clusters]

    def _ask(self, space: Space, routed: list[Routed]) -> list[Told]:
        missing = {p.cluster: p for each in routed for p in each.prefixes if p.state == NEVER_READ}
        # One that cannot be read is retired, or nothing holds any more: the script will say.
        self._fetch(space, list(missing.values()))
        calls = [
            (space.keys, arguments(each.arrival, self._settings, each.prefixes)) for each in routed
        ]
        told = []
        for each, raw in zip(routed, self._store.scripts("arrive", calls), strict=True):
            reply = Reply.of(raw)
            by_cluster = {prefix.cluster: prefix for prefix in each.prefixes} if reply.tails else {}
            for cluster, state, first, records in reply.each_tail():
                self.cache.extend(by_cluster[cluster], state, first, records)
            told.append(Told(each, reply, [prefix.epoch for prefix in each.prefixes]))
        return told

    def _fetch(self, space: Space, prefixes: Sequence[Prefix]) -> None:
        """Bring prefixes up to date, but those of retired clusters."""
        for start in range(0, len(prefixes), LOADED_AT_ONCE):
            part = prefixes[start : start + LOADED_AT_ONCE]
            calls: list[tuple[Keys, list[Argument]]] = [
                (space.keys, [prefix.cluster, prefix.state]) for prefix in part
            ]
            for prefix, raw in zip(part, self._store.scripts("read", calls), strict=True):
                if raw:
                    self.cache.extend(prefix, *raw)

    def _conclude(self, space: Space, told: list[Told]) -> list[Answer | bool | None]:
        """Compare the arrivals whose script answered everything, in one go."""
        whole = [each for each in told if _answered_at_one_instant(each)]
        found = compare(
            [self._query(each) for each in whole],
            self._settings.threshold,
            self._settings.matches,
        )
        listed = {match.sequence for each in found for match in _listed(each)}
        names = self._names(space, listed)
        if names is None:
            return [False] * len(told)
        answered = {
            id(each): _placed(each, one, names) for each, one in zip(whole, found, strict=True)
        }
        return [answered.get(id(each), _unless_unknown(each)) for each in told]

    def _query(self, told: Told) -> Query:
        vector = told.routed.vector
        if told.reply.outcome == "again":
            # Answer for the vector stored then: another machine may have embedded it.
            for prefix in told.routed.prefixes:
                here = np.flatnonzero(prefix.sequences == told.reply.sequence)
                if len(here):
                    vector = prefix.vectors[here[0]]
                    break
        return Query(vector, told.routed.prefixes, told.reply.sequence, told.reply.origin)

    def _catch_up(self, space: Space, told: list[Told]) -> None:
        """After a round: split what was full, load what was behind, follow the log."""
        replies = [each.reply for each in told]
        for reply in replies:
            if reply.outcome == "full":
                self._maintainer.work_on(space, CLUSTER.unpack(reply.text)[0])
        behind = {
            prefix.cluster: prefix
            for each in told
            if each.reply.outcome == "behind"
            for prefix in each.routed.prefixes
        }
        self._fetch(space, list(behind.values()))
        moved = any(reply.outcome in ("moved", "full") for reply in replies)
        if moved or any(reply.version > space.table.version for reply in replies):
            space.table.refresh()


def _answered_at_one_instant(told: Told) -> bool:
    """Whether the prefixes held are those the script saw.

    A later arrival of the same batch may have brought a newer epoch, in which a record has moved
    to a cluster that was read before it came there.
    """
    return told.reply.outcome in ("placed", "again") and told.epochs == [
        prefix.epoch for prefix in told.routed.prefixes
    ]


def arguments(
    arrival: Arrival, settings: IndexSettings, probed: Sequence[Prefix] = ()
) -> list[Argument]:
    """The arguments of the `arrive` script.

    `probed` are the clusters looked into, home first; without them it is only recognised.
    """
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
    probes = b"".join([prefix.cluster + prefix.state for prefix in probed])
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
