"""One round of placing a batch: route, bring the cache up, run the scripts, compare.

Owns the rule that an answer rests on what one script saw at one instant: an arrival is compared
only when the prefixes held are those its script saw, and asked again otherwise. It must not know
how often it is repeated.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from worker.errors import InfrastructureError
from worker.index.answers import Answer, Arrival, IndexSettings, Neighbour
from worker.index.asking import (
    PROBED,
    STALE,
    WAITING,
    Asked,
    Reply,
    ask,
    each_tail,
    known,
    runs,
)
from worker.index.cache import Cache, Prefix
from worker.index.centroids import Route
from worker.index.comparing import Found, Match, Query, compare
from worker.index.keys import CLUSTER, NEVER_READ
from worker.index.names import Names
from worker.index.space import Space
from worker.index.splitting import Maintainer
from worker.index.store import Store
from worker.vectors import Vectors

ROW = 160
"""Bytes of cache a record takes, spare room included; only to keep a part within the cache."""

COMPARED = ("placed", "again")
"""Outcomes of arrivals that are compared with what they probed."""


class Routed(NamedTuple):
    """An arrival, where it goes, and what its script said."""

    arrival: Arrival
    vector: Vectors
    route: Route
    reply: Reply
    prefixes: list[Prefix]


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
        """Ask once for each arrival of a namespace, script by script.

        Answers each with its Answer, or False where it is to be asked again; then whether the
        generation has stopped answering. The round ends with the first script that could not
        answer all: later arrivals of their partitions must not overtake those that wait.
        """
        vectors = np.stack([arrival.vector for arrival in arrivals if arrival.vector is not None])
        version = space.table.version
        routes = self._route(space, vectors)
        answers: list[Answer | bool | None] = []
        for part in self._parts(space, arrivals, routes):
            told = self._ask(space, arrivals[part], vectors[part], routes[part], version)
            concluded = self._conclude(space, told)
            self._catch_up(space, told)
            for at in self._astray(space, told, version):
                concluded[at] = False
            answers += concluded
            self.cache.trim()
            if any(each.reply.outcome in WAITING for each in told):
                break
        stale = any(each.reply.outcome == STALE for each in told)
        return answers + [False] * (len(arrivals) - len(answers)), stale

    def _route(self, space: Space, vectors: Vectors) -> list[Route]:
        chosen = self._settings
        return space.table.route(vectors, chosen.probes, chosen.probe_margin, chosen.least_probes)

    def _astray(self, space: Space, told: list[Routed], version: int) -> list[int]:
        """Those that would look elsewhere, too, by the clusters there were at their script.

        `version` is that of the table by which they were routed. A split elsewhere may have made
        a centroid that is nearer than those probed, and what was stored there since is not seen.
        """
        late = [
            at
            for at, each in enumerate(told)
            if each.reply.outcome in COMPARED and each.reply.version > version
        ]
        if not late:
            return []
        routes = self._route(space, np.stack([told[at].vector for at in late]))
        return [
            at
            for at, route in zip(late, routes, strict=True)
            if not set(route.clusters) <= set(told[at].route.clusters)
        ]

    def _parts(
        self, space: Space, arrivals: Sequence[Arrival], routes: list[Route]
    ) -> Iterable[slice]:
        """Split a batch so that each part fits into a script, and its clusters into the cache."""
        fitting = self._settings.cache_bytes // (self._settings.limits(len(space.table)).due * ROW)
        asked = [
            Asked(arrival, route.clusters) for arrival, route in zip(arrivals, routes, strict=True)
        ]
        first = 0
        for part in runs(asked, self._settings.script_arrivals, min(fitting, PROBED)):
            yield slice(first, first + len(part))
            first += len(part)

    def _ask(
        self,
        space: Space,
        arrivals: Sequence[Arrival],
        vectors: Vectors,
        routes: list[Route],
        version: int,
    ) -> list[Routed]:
        prefixes = {
            cluster: self.cache.get(space.keys.origin, cluster)
            for cluster in dict.fromkeys(each for route in routes for each in route.clusters)
        }
        # One that cannot be read is retired, or nothing holds any more: the script will say.
        self._fetch(space, [each for each in prefixes.values() if each.state == NEVER_READ])
        asked = [
            Asked(arrival, route.clusters) for arrival, route in zip(arrivals, routes, strict=True)
        ]
        told = ask(self._store, space, self._settings, [asked], prefixes, version=version)[0]
        for packed, state, first, records in each_tail(told.tails):
            self.cache.extend(prefixes[CLUSTER.unpack(packed)[0]], state, first, records)
        return [
            Routed(arrival, vector, route, reply, [prefixes[cluster] for cluster in route.clusters])
            for arrival, vector, route, reply in zip(
                arrivals, vectors, routes, told.replies, strict=True
            )
        ]

    def _fetch(self, space: Space, prefixes: Sequence[Prefix]) -> None:
        """Bring prefixes up to date, but those of retired clusters."""
        held = [(prefix.cluster, prefix.state) for prefix in prefixes]
        for prefix, raw in zip(prefixes, self._store.read_clusters(space.keys, held), strict=True):
            if raw:
                self.cache.extend(prefix, *raw)

    def _conclude(self, space: Space, told: list[Routed]) -> list[Answer | bool | None]:
        """Compare the arrivals that were placed, in one go."""
        placed = [each for each in told if each.reply.outcome in COMPARED]
        found = compare(
            [_query(each) for each in placed],
            self._settings.threshold,
            self._settings.matches,
        )
        stored = {
            each.reply.sequence: each.arrival.image_id for each in placed if each.arrival.store
        }
        self._names.learn(space, stored)
        listed = {match.sequence for each in found for match in _listed(each)}
        names = self._names.of(space, listed)
        if names is None:
            return [False] * len(told)
        answered = {
            id(each): _placed(each, one, names) for each, one in zip(placed, found, strict=True)
        }
        return [answered.get(id(each), _unless_unknown(each)) for each in told]

    def _catch_up(self, space: Space, told: list[Routed]) -> None:
        """After a round: split what was full, load what was behind, follow the log."""
        replies = [each.reply for each in told]
        for reply in replies:
            if reply.outcome == "full":
                self._maintainer.work_on(space, CLUSTER.unpack(reply.text)[0])
        # Those held back behind one that was behind would be so next: all are caught up at once.
        if any(reply.outcome == "behind" for reply in replies):
            behind = {
                prefix.cluster: prefix
                for each in told
                if each.reply.outcome in ("behind", "held")
                for prefix in each.prefixes
            }
            self._fetch(space, list(behind.values()))
        moved = any(reply.outcome in ("moved", "full") for reply in replies)
        if moved or any(reply.version > space.table.version for reply in replies):
            space.table.refresh()


def _query(told: Routed) -> Query:
    vector = told.vector
    if told.reply.outcome == "again":
        # Answer for the vector stored then: another machine may have embedded it.
        for prefix in told.prefixes:
            here = np.flatnonzero(prefix.sequences == told.reply.sequence)
            if len(here):
                vector = prefix.vectors[here[0]]
                break
    return Query(vector, told.prefixes, told.reply.sequence, told.reply.origin)


def _unless_unknown(told: Routed) -> Answer | bool:
    answer = known(told.reply, told.arrival)
    return False if answer is None else answer


def _listed(found: Found) -> list[Match]:
    return [match for match in (found.earliest, found.best, *found.matches) if match]


def _placed(told: Routed, found: Found, names: dict[int, str]) -> Answer:
    def neighbour(match: Match | None) -> Neighbour | None:
        if match is None:
            return None
        if match.sequence not in names:
            raise InfrastructureError(
                f"the index is damaged: sequence {match.sequence} has a vector, but no id; see "
                "`python -m worker fsck`"
            )
        return Neighbour(names[match.sequence], match.sequence, match.similarity)

    return Answer(
        "placed",
        told.reply.sequence if told.arrival.store else None,
        earliest=neighbour(found.earliest),
        best=neighbour(found.best),
        matches=tuple(each for match in found.matches if (each := neighbour(match))),
        clusters_probed=len(told.route.clusters),
        vectors_compared=found.compared,
        cluster_records=told.prefixes[0].length,
        truncated=told.route.truncated,
    )
