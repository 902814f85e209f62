"""How much of what brute force finds the index finds too, on a sample of stored images.

Owns the comparison of a sample with every vector of its namespace, one bounded step at a time. An
image counts as found when some earlier image at the threshold lies in a cluster it would probe.
"""

import math
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
NOTHING = np.zeros(0, LAYOUT)


@dataclass(frozen=True)
class AuditResult:
    """Images sampled; those with an earlier match by brute force; of these, found by probing."""

    sampled: int
    duplicates: int
    found: int

    @property
    def recall(self) -> float:
        """Share of the duplicates found; NaN when there was none to find."""
        return self.found / self.duplicates if self.duplicates else math.nan


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
        for cluster, records in self._read(self._clusters[:STEP]):
            if len(self._sequences) and len(records):
                self._compare(cluster, records)
        self._clusters = self._clusters[STEP:]
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
        # In the order drawn: sorted, the first of them would be the oldest.
        drawn = dict.fromkeys(
            1 + secrets.randbelow(last) for _ in range(TRIES * sample if last else 0)
        )
        fields = [keys.record(sequence) for sequence in drawn]
        records = self._store.commands([("HGET", key, first) for key, first in fields])
        homes = {
            sequence: home
            for sequence, record in zip(drawn, records, strict=True)
            if record and (home := home_of(record)) is not None
        }
        chosen = list(homes)[:sample]
        stored = dict(self._read(sorted({homes[sequence] for sequence in chosen})))
        found: dict[int, Vectors] = {}
        for sequence in chosen:
            here = stored.get(homes[sequence], NOTHING)
            for at in np.flatnonzero(here["sequence"] == sequence):
                found[sequence] = here["vector"][at]
        rows = np.array(list(found.values()), np.int8).reshape(-1, DIMENSIONS)
        return np.array(list(found), np.uint64), rows

    def _read(self, clusters: list[int]) -> list[tuple[int, npt.NDArray[np.void]]]:
        held = [(CLUSTER.pack(cluster), NEVER_READ) for cluster in clusters]
        raws = self._store.read_clusters(self._space.keys, held)
        return [
            (cluster, np.frombuffer(raw[2], LAYOUT))
            for cluster, raw in zip(clusters, raws, strict=True)
            if raw
        ]
