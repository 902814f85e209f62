"""The centroid table of one generation, kept in memory by following its log, and routing with it.

Owns which clusters there are and which of them a vector visits. It must not know records.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from worker.index.kernel import one_thread, product
from worker.index.keys import ADDED, CENTROID, CLUSTER, Keys
from worker.index.store import Store
from worker.vectors import DIMENSIONS, Vectors, directions_of, squared_norms

LOG_PAGE = 1000
"""Log entries read at once; a worker further behind than the log reaches reads the whole table."""

ROWS = 64
"""Rows multiplied with all centroids at once: 16 MB of products with 60,000 of them."""

Rows = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


class Route(NamedTuple):
    """Clusters one vector visits, nearest first, and whether the budget left some out."""

    clusters: tuple[int, ...]
    truncated: bool


class Table:
    """Cluster id → centroid direction; safe to use from several threads."""

    def __init__(self, store: Store, keys: Keys) -> None:
        self._store, self._keys = store, keys
        self._lock = threading.RLock()
        self._centroids: Vectors = np.zeros((16, DIMENSIONS), np.int8)
        self._inverse: npt.NDArray[np.float32] = np.zeros(16, np.float32)
        self._ids: npt.NDArray[np.int64] = np.zeros(16, np.int64)
        self._places: dict[int, int] = {}
        self.version = 0

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, cluster: int) -> bool:
        return cluster in self._places

    @contextmanager
    def steady(self) -> Iterator[None]:
        """Let no other thread change the table meanwhile: what is in it now stays in it."""
        with self._lock:
            yield

    def refresh(self) -> None:
        """Follow the log to its end; read the whole table when the log no longer reaches back."""
        with self._lock:
            while True:
                entries = self._store.command(
                    "XRANGE", self._keys.log, f"({self.version}-1", "+", "COUNT", LOG_PAGE
                )
                if not entries:
                    if self.version == 0:
                        self._read_whole()
                    return
                if _version(entries[0]) != self.version + 1:
                    self._read_whole()
                    continue
                for entry in entries:
                    self._apply(entry)

    def _read_whole(self) -> None:
        # The version is read first: every change made while the pages arrive is applied again
        # from the log, and applying a change twice is the same as once.
        version = int(self._store.command("HGET", self._keys.meta, "version") or 0)
        self._places.clear()
        cursor = "0"
        while True:
            at, page = self._store.command("HSCAN", self._keys.centroids, cursor, "COUNT", "512")
            for cluster, centroid in page.items():
                self._add(CLUSTER.unpack(cluster)[0], centroid)
            cursor = str(int(at))
            if cursor == "0":
                break
        self.version = version

    def _apply(self, entry: tuple[bytes, dict[bytes, bytes]]) -> None:
        fields = entry[1]
        retired, added = fields[b"retired"], fields[b"added"]
        for (cluster,) in CLUSTER.iter_unpack(retired):
            self._remove(cluster)
        for at in range(0, len(added), ADDED):
            (cluster,) = CLUSTER.unpack_from(added, at)
            self._add(cluster, added[at + CLUSTER.size : at + ADDED])
        self.version = _version(entry)

    def _add(self, cluster: int, packed: bytes) -> None:
        place = self._places.setdefault(cluster, len(self._places))
        if place == len(self._ids):
            self._ids = np.resize(self._ids, 2 * place)
            self._inverse = np.resize(self._inverse, 2 * place)
            self._centroids = np.resize(self._centroids, (2 * place, DIMENSIONS))
        centroid = np.frombuffer(packed, np.int8, CENTROID)
        self._ids[place] = cluster
        self._centroids[place] = centroid
        square = int(squared_norms(centroid[None])[0])
        self._inverse[place] = 1.0 / np.sqrt(square) if square else 0.0

    def _remove(self, cluster: int) -> None:
        place = self._places.pop(cluster, None)
        if place is None:
            return
        last = len(self._places)
        if place != last:
            for column in (self._ids, self._inverse, self._centroids):
                column[place] = column[last]
            self._places[int(self._ids[place])] = place

    def route(self, vectors: Vectors, probes: int, margin: float, least: int = 1) -> list[Route]:
        """Choose the clusters of each int8 row (m, 128): the nearest first.

        At most `probes` of them (0: all), and none less similar than the nearest by more than
        `margin` but the `least` nearest ones. A route is truncated when a cluster within the margin
        did not fit the budget.
        One integer product does the whole batch: with 60,000 centroids it takes less than a
        second level of centroids would save (deploy/decisions/index-routing.md).
        """
        with self._lock, one_thread():
            count = len(self._places)
            ids, inverse = self._ids[:count].copy(), self._inverse[:count].copy()
            products = product(vectors, self._centroids[:count])
        near = products.astype(np.float32)
        near *= inverse
        margins = (margin * np.sqrt(squared_norms(vectors))).astype(np.float32)
        return _routes(ids, near, probes, margins, least)

    def nearest(
        self, vectors: Vectors, without: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Return the nearest cluster but one to each int8 row (m, 128), and its similarity.

        Where there is no other cluster they are 0 and -inf.
        """
        with self._lock:
            count, place = len(self._places), self._places.get(without)
            ids, inverse = self._ids[:count].copy(), self._inverse[:count].copy()
            centroids = self._centroids[:count].copy()
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
            return list(self._places)

    def after(self, cluster: int, count: int) -> list[int]:
        """Return the `count` clusters whose ids follow one; behind the highest is the lowest."""
        ids = np.sort(self.clusters())
        first = int(np.searchsorted(ids, cluster, side="right"))
        return [int(each) for each in np.roll(ids, -first)[:count]]

    def centroid(self, cluster: int) -> Vectors:
        """Return the int8 centroid (128,) of a cluster in the table."""
        with self._lock:
            centroid: Vectors = self._centroids[self._places[cluster]].copy()
            return centroid

    def directions_of(self, clusters: list[int]) -> Rows:
        """Return the unit centroids (n, 128) of clusters in the table."""
        with self._lock:
            return directions_of(self._centroids[[self._places[cluster] for cluster in clusters]])

    def nearest_to(self, cluster: int, count: int) -> list[int]:
        """Return the clusters whose centroids are most similar to one cluster's."""
        with self._lock:
            if cluster not in self._places:
                return []
            place, total = self._places[cluster], len(self._places)
            with one_thread():
                near = product(self._centroids[:total], self._centroids[place][None])[:, 0]
            near = near * self._inverse[:total]
            near[place] = -np.inf
            order = np.argsort(-near, kind="stable")[: min(count, total - 1)]
            return [int(each) for each in self._ids[order]]


def _routes(ids: Ids, near: Rows, probes: int, margins: Rows, least: int) -> list[Route]:
    """The route of each row of similarities `near` (m, n) times the row's length."""
    count, least = len(ids), min(least, len(ids))
    wanted = near >= (near.max(axis=1) - margins)[:, None] if probes else np.ones(near.shape, bool)
    within = wanted.sum(axis=1)
    for at in (within < least).nonzero()[0]:
        # All that are as near as the last of them: among equals the lowest ids are taken.
        wanted[at] = near[at] >= np.partition(near[at], count - least)[count - least]
    rows, places = wanted.nonzero()
    # Among equals the lowest id, the oldest cluster: there the earliest images are.
    order = np.lexsort((ids[places], -near[rows, places], rows))
    clusters = ids[places[order]].tolist()
    routes, first = [], 0
    for several, fitting in zip(wanted.sum(axis=1).tolist(), within.tolist(), strict=True):
        taken = min(max(fitting, least), probes) if probes else several
        routes.append(Route(tuple(clusters[first : first + taken]), taken < fitting))
        first += several
    return routes


def _version(entry: tuple[bytes, dict[bytes, bytes]]) -> int:
    return int(entry[0].split(b"-")[0])
