"""How much of what brute force finds the index finds too, on a sample of stored images.

Owns the comparison of a sample with every vector of its namespace, one bounded step at a time. An
image counts as found when some earlier image at the threshold lies in a cluster it would probe.
"""

import secrets
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from worker.index.answers import IndexSettings
from worker.index.cache import LAYOUT
from worker.index.keys import CLUSTER, NEVER_READ, home_of
from worker.index.space import Space
from worker.index.store import Store
from worker.vectors import DIMENSIONS, Vectors, similarity

STEP = 32
"""Clusters read in one step: some 1 MB."""
TRIES = 4
"""Images drawn for one wanted: deleted ones and exact copies have no vector."""


@dataclass(frozen=True)
class AuditResult:
    """Images sampled; those with an earlier match by brute force; of these, found by probing."""

    sampled: int
    duplicates: int
    found: int

    @property
    def recall(self) -> float:
        """Share of the duplicates found; 1 when there was none to find."""
        return self.found / self.duplicates if self.duplicates else 1.0


class Audit:
    """One audit under way. Cost: one read of the namespace, spread over the steps."""

    def __init__(self, store: Store, space: Space, settings: IndexSettings, sample: int) -> None:
        self._store, self._space, self._settings = store, space, settings
        space.table.refresh()
        self._clusters = space.table.clusters()
        self._sequences, self._vectors = self._draw(sample)
        routes = (
            space.table.route(
                self._vectors, settings.probes, settings.probe_margin, settings.least_probes
            )
            if len(self._vectors)
            else []
        )
        self._probed = [frozenset(route.clusters) for route in routes]
        self._has_match = np.zeros(len(self._sequences), bool)
        self._is_found = np.zeros(len(self._sequences), bool)

    def step(self) -> AuditResult | None:
        """Compare with some more clusters; the result once all are done."""
        part, self._clusters = self._clusters[:STEP], self._clusters[STEP:]
        for cluster, records in self._read(part):
            if len(self._sequences) and len(records):
                self._compare(cluster, records)
        if self._clusters:
            return None
        return AuditResult(
            len(self._sequences), int(self._has_match.sum()), int(self._is_found.sum())
        )

    def run(self) -> AuditResult:
        """Take all steps at once."""
        while (result := self.step()) is None:
            pass
        return result

    def _compare(self, cluster: int, records: npt.NDArray[np.void]) -> None:
        near = similarity(self._vectors, records["vector"]) >= self._settings.threshold
        near &= records["sequence"][None, :] < self._sequences[:, None]
        near &= records["sequence"][None, :] > 0
        for at in np.flatnonzero(near.any(axis=1)):
            self._has_match[at] = True
            self._is_found[at] |= cluster in self._probed[at]

    def _draw(self, sample: int) -> tuple[npt.NDArray[np.uint64], Vectors]:
        """Vectors of randomly drawn images, found where their records say they are."""
        keys = self._space.keys
        last = int(self._store.command("HGET", keys.meta, "sequence") or 0)
        drawn = {1 + secrets.randbelow(last) for _ in range(TRIES * sample)} if last else set()
        wanted = sorted(drawn)
        fields = [keys.record(sequence) for sequence in wanted]
        records = self._store.commands([("HGET", key, first) for key, first in fields])
        homes: dict[int, list[int]] = {}
        for sequence, record in zip(wanted, records, strict=True):
            home = home_of(record) if record else None
            if home is not None:
                homes.setdefault(home, []).append(sequence)
        chosen = list(homes.items())[:sample]
        found: list[tuple[int, Vectors]] = []
        for cluster, stored in self._read([cluster for cluster, _ in chosen]):
            for sequence in homes[cluster]:
                here = np.flatnonzero(stored["sequence"] == sequence)
                if len(here) and len(found) < sample:
                    found.append((sequence, stored["vector"][here[0]]))
        sequences = np.array([sequence for sequence, _ in found], np.uint64)
        vectors = [vector for _, vector in found] or [np.zeros((0, DIMENSIONS), np.int8)]
        return sequences, np.stack(vectors) if found else vectors[0]

    def _read(self, clusters: list[int]) -> list[tuple[int, npt.NDArray[np.void]]]:
        held = [(CLUSTER.pack(cluster), NEVER_READ) for cluster in clusters]
        raws = self._store.read_clusters(self._space.keys, held)
        return [
            (cluster, np.frombuffer(raw[2], LAYOUT))
            for cluster, raw in zip(clusters, raws, strict=True)
            if raw
        ]
