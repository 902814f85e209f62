"""The centroid table of one generation, kept in memory by following its log, and routing with it.

Owns which clusters there are and which of them a vector visits. It must not know records.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from worker.errors import InfrastructureError
from worker.index.kernel import one_thread, places_in, product
from worker.index.keys import ADDED, CENTROID, CLUSTER, Keys
from worker.index.store import Store
from worker.vectors import DIMENSIONS, Vectors, directions_of, squared_norms

LOG_PAGE = 1000
"""Log entries read at once; a worker further behind than the log reaches reads the whole table."""

ROWS = 64
"""Rows multiplied with all centroids at once: 16 MB of products with 60,000 of them."""

LEAST_ROWS = 16
"""Room for so many centroids at least, as more come."""

Rows = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Entry = tuple[bytes, dict[bytes, bytes]]
"""One of the log: name and fields."""


class Route(NamedTuple):
    """Clusters one vector visits, nearest first, and whether the budget left some out."""

    clusters: tuple[int, ...]
    truncated: bool


class Columns:
    """Ids, centroids and inverse lengths side by side, as they were at one version of the log."""

    def __init__(self, version: int, packed: Mapping[bytes, bytes]) -> None:
        """`packed`: centroids by cluster, as the index keeps them."""
        self.version = version
        self.ids: Ids = np.frombuffer(b"".join(packed), ">u4").astype(np.int64)
        rows = np.frombuffer(b"".join(packed.values()), np.int8)
        self.centroids: Vectors = rows.reshape(-1, DIMENSIONS).copy()
        self.inverse = _inverse(self.centroids)
        self.places = {cluster: place for place, cluster in enumerate(self.ids.tolist())}

    def apply(self, entry: Entry) -> None:
        """Follow the log's next entry; doing so twice is the same as once."""
        retired, added = entry[1][b"retired"], entry[1][b"added"]
        for (cluster,) in CLUSTER.iter_unpack(retired):
            self._remove(cluster)
        for at in range(0, len(added), ADDED):
            (cluster,) = CLUSTER.unpack_from(added, at)
            self._add(cluster, added[at + CLUSTER.size : at + ADDED])
        self.version = _version(entry)

    def _add(self, cluster: int, packed: bytes) -> None:
        place = self.places.setdefault(cluster, len(self.places))
        if place == len(self.ids):
            size = max(LEAST_ROWS, 2 * place)
            self.ids = np.resize(self.ids, size)
            self.inverse = np.resize(self.inverse, size)
            self.centroids = np.resize(self.centroids, (size, DIMENSIONS))
        self.ids[place] = cluster
        self.centroids[place] = np.frombuffer(packed, np.int8, CENTROID)
        self.inverse[place] = _inverse(self.centroids[place : place + 1])[0]

    def _remove(self, cluster: int) -> None:
        place = self.places.pop(cluster, None)
        if place is None:
            return
        last = len(self.places)
        if place != last:
            for column in (self.ids, self.inverse, self.centroids):
                column[place] = column[last]
            self.places[int(self.ids[place])] = place


class Table:
    """Cluster id → centroid direction; safe to use from several threads."""

    def __init__(self, store: Store, keys: Keys) -> None:
        self._store, self._keys = store, keys
        self._following = threading.Lock()  # taken before the other one
        self._lock = threading.RLock()
        self._columns = Columns(0, {})

    def __len__(self) -> int:
        return len(self._columns.places)

    def __contains__(self, cluster: int) -> bool:
        return cluster in self._columns.places

    @property
    def version(self) -> int:
        """How far the log was followed."""
        return self._columns.version

    @contextmanager
    def steady(self) -> Iterator[None]:
        """Let no other thread change the table meanwhile: what is in it now stays in it.

        `refresh` is not to be called inside.
        """
        with self._lock:
            yield

    def refresh(self) -> None:
        """Follow the log to its end; read the whole table when the log no longer reaches back.

        Others may route while Redis is asked and its answers are read: what they use is changed
        in steps of the log, or all at once.
        """
        with self._following:
            if self._follow(self._columns, self._lock) and self.version:
                return
            fresh = self._read_whole()
            # Its pages are of different moments: only at the end of the log does it hold together.
            while not self._follow(fresh, nullcontext()):
                fresh = self._read_whole()
            with self._lock:
                self._columns = fresh

    def _follow(self, columns: Columns, lock: AbstractContextManager[object]) -> bool:
        """Follow the log from the version columns have; False when it does not reach back."""
        while entries := self._store.command(
            "XRANGE", self._keys.log, f"({columns.version}-1", "+", "COUNT", LOG_PAGE
        ):
            if _version(entries[0]) != columns.version + 1:
                return False
            with lock:
                for entry in entries:
                    columns.apply(entry)
        return True

    def _read_whole(self) -> Columns:
        # The version is read first: every change made while the pages arrive is applied again
        # from the log.
        version = int(self._store.command("HGET", self._keys.meta, "version") or 0)
        packed: dict[bytes, bytes] = {}
        cursor = "0"
        while True:
            at, page = self._store.command("HSCAN", self._keys.centroids, cursor, "COUNT", "512")
            packed |= page
            cursor = str(int(at))
            if cursor == "0":
                return Columns(version, packed)

    def route(self, vectors: Vectors, probes: int, margin: float, least: int = 1) -> list[Route]:
        """Choose the clusters of each int8 row (m, 128): the nearest first.

        At most `probes` of them (0: all), and none less similar than the nearest by more than
        `margin` but the `least` nearest ones. A route is truncated when a cluster within the margin
        did not fit the budget.
        One integer product does ROWS of them: with 60,000 centroids it takes less than a second
        level of centroids would save (deploy/decisions/index-routing.md). Others have the table in
        between, so later rows may be routed by a newer one. Raises InfrastructureError where there
        is no cluster at all.
        """
        routes: list[Route] = []
        for at in range(0, len(vectors), ROWS):
            rows = vectors[at : at + ROWS]
            with self._lock, one_thread():
                table, count = self._columns, len(self._columns.places)
                if not count:
                    raise InfrastructureError(
                        "the index is damaged: it has no cluster; see `python -m worker fsck`"
                    )
                ids, inverse = table.ids[:count].copy(), table.inverse[:count].copy()
                products = product(rows, table.centroids[:count])
            near = products.astype(np.float32)
            near *= inverse
            margins = (margin * np.sqrt(squared_norms(rows))).astype(np.float32)
            routes += _routes(ids, near, probes, margins, least)
        return routes

    def nearest(
        self, vectors: Vectors, without: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Return the nearest cluster but one to each int8 row (m, 128), and its similarity.

        Where there is no other cluster they are 0 and -inf.
        """
        with self._lock:
            table = self._columns
            count, place = len(table.places), table.places.get(without)
            ids, inverse = table.ids[:count].copy(), table.inverse[:count].copy()
            centroids = table.centroids[:count].copy()
        homes = np.zeros(len(vectors), np.int64)
        similarities = np.full(len(vectors), -np.inf, np.float32)
        if count == (place is not None):
            return homes, similarities
        for at in range(0, len(vectors), ROWS):
            part = slice(at, at + ROWS)
            with one_thread():
                near = product(vectors[part], centroids).astype(np.float32)
            near *= inverse
            if place is not None:
                near[:, place] = -np.inf
            best = near.argmax(axis=1)
            homes[part], similarities[part] = ids[best], near[np.arange(len(best)), best]
        lengths = np.sqrt(np.maximum(squared_norms(vectors), 1)).astype(np.float32)
        return homes, similarities / lengths

    def clusters(self) -> list[int]:
        """Return the ids of all living clusters."""
        with self._lock:
            return list(self._columns.places)

    def after(self, cluster: int, count: int) -> list[int]:
        """Return the `count` clusters whose ids follow one; behind the highest is the lowest."""
        ids = np.sort(self.clusters())
        first = int(np.searchsorted(ids, cluster, side="right"))
        return [int(each) for each in np.roll(ids, -first)[:count]]

    def centroid(self, cluster: int) -> Vectors:
        """Return the int8 centroid (128,) of a cluster in the table."""
        with self._lock:
            table = self._columns
            centroid: Vectors = table.centroids[table.places[cluster]].copy()
            return centroid

    def directions_of(self, clusters: list[int]) -> Rows:
        """Return the unit centroids (n, 128) of clusters in the table."""
        with self._lock:
            table = self._columns
            return directions_of(table.centroids[[table.places[cluster] for cluster in clusters]])

    def nearest_to(self, cluster: int, count: int) -> list[int]:
        """Return the clusters whose centroids are most similar to one cluster's."""
        with self._lock:
            table = self._columns
            if cluster not in table.places:
                return []
            place, total = table.places[cluster], len(table.places)
            with one_thread():
                near = product(table.centroids[:total], table.centroids[place][None])[:, 0]
            near = near * table.inverse[:total]
            near[place] = -np.inf
            order = np.argsort(-near, kind="stable")[: min(count, total - 1)]
            return [int(each) for each in table.ids[order]]


def _routes(ids: Ids, near: Rows, probes: int, margins: Rows, least: int) -> list[Route]:
    """The route of each row of similarities `near` (m, n) times the row's length."""
    count, least = len(ids), min(least, len(ids))
    wanted = near >= (near.max(axis=1) - margins)[:, None] if probes else np.ones(near.shape, bool)
    rows, places = places_in(wanted)
    within = np.bincount(rows, minlength=len(near))
    few = (within < least).nonzero()[0]
    for at in few:
        # All that are as near as the last of them: among equals the lowest ids are taken.
        wanted[at] = near[at] >= np.partition(near[at], count - least)[count - least]
    if len(few):
        rows, places = places_in(wanted)
    each = np.bincount(rows, minlength=len(near))
    # Among equals the lowest id, the oldest cluster: there the earliest images are.
    order = np.lexsort((ids[places], -near[rows, places], rows))
    clusters = ids[places[order]].tolist()
    routes, first = [], 0
    for several, fitting in zip(each.tolist(), within.tolist(), strict=True):
        taken = min(max(fitting, least), probes) if probes else several
        routes.append(Route(tuple(clusters[first : first + taken]), taken < fitting))
        first += several
    return routes


def _inverse(centroids: Vectors) -> npt.NDArray[np.float32]:
    """One over the length of each, and 0 for one that points nowhere."""
    squares = squared_norms(centroids)
    return np.where(squares > 0, 1.0 / np.sqrt(np.maximum(squares, 1)), 0.0).astype(np.float32)


def _version(entry: Entry) -> int:
    return int(entry[0].split(b"-")[0])
