"""Upkeep of clusters: splitting, moving boundary records, merging, compacting.

Owns when and how a cluster is rebuilt. A worker plans with a copy of the records under a fenced
lock; one script then swaps, and does nothing when the cluster was rewritten meanwhile. The rule
for boundary records is LIRE of SPFresh (Xu et al., SOSP 2023). It must not know images or verdicts.
"""

import secrets
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from worker.index.answers import IndexSettings
from worker.index.cache import LAYOUT
from worker.index.kernel import inner
from worker.index.keys import CENTROID, CLUSTER, NEVER_READ, State
from worker.index.space import Space
from worker.index.store import Argument, Store
from worker.vectors import Vectors, directions_of, quantize

NEIGHBOURS = 48
"""Nearest clusters that may give or take boundary records: with 16 twice as many stayed behind."""
ROUNDS = 8
"""Iterations of 2-means; boundaries move little after a few."""
SMALLEST_SHARE = 0.1
"""A split leaving less than this on one side is cut at the median instead."""
NEARER = 1e-5
"""A record moves only to a centroid this much more similar: rounding alone moves nothing."""
UNPLANNED = 64
"""Records appended while a split was planned that its script may place by itself."""

Rows = npt.NDArray[np.float32]
Step = Callable[[str], None]


@dataclass(frozen=True)
class Contents:
    """All records of a cluster at one instant."""

    cluster: int
    state: State
    sequences: npt.NDArray[np.uint64]
    vectors: Vectors

    @property
    def living(self) -> npt.NDArray[np.intp]:
        """Places of the records that are not deleted."""
        return np.flatnonzero(self.sequences)


class Maintainer:
    """Does one piece of upkeep at a time.

    `step` is told the name of each step after it is done: tests end the work there, as a crash
    would.
    """

    def __init__(
        self, store: Store, settings: IndexSettings, step: Step = lambda name: None
    ) -> None:
        self._store, self._settings, self._step = store, settings, step
        self.splits = 0

    def work(self, space: Space) -> bool:
        """Take one due cluster and rebuild it; False when none is due or another worker has it."""
        due = self._store.command("SRANDMEMBER", space.keys.due)
        return due is not None and self.work_on(space, CLUSTER.unpack(due)[0])

    def work_on(self, space: Space, cluster: int) -> bool:
        """Rebuild one cluster if it needs it; False when another worker holds its lock."""
        token = secrets.token_hex(16)
        if not self._store.command(*self._lock(space, cluster, token)):
            return False
        self._step("locked")
        for _ in range(self._settings.place_attempts):
            contents = self.read(space, cluster)
            if contents is None or not (plan := self._plan(space, contents)):
                self._store.script("release", space.keys, CLUSTER.pack(cluster), token, 1)
                return True
            self._step("planned")
            outcome, *new = self._store.script(
                "rehome", space.keys, *plan.arguments(self._settings, token)
            )
            if outcome == b"done":
                self._step("swapped")
                self.splits += len(plan.new) > 1
                space.table.refresh()
                self._attract(space, [CLUSTER.unpack(each)[0] for each in new])
                return True
            if outcome != b"changed":
                return False
        self._store.script("release", space.keys, CLUSTER.pack(cluster), token, 0)
        return False

    def read(self, space: Space, cluster: int) -> Contents | None:
        """Read all records of a cluster; None when it is retired."""
        return next(iter(self._read_all(space, [cluster])), None)

    def _read_all(self, space: Space, clusters: list[int]) -> list[Contents]:
        """Read the clusters that are alive."""
        held = [(CLUSTER.pack(cluster), NEVER_READ) for cluster in clusters]
        read = []
        for cluster, raw in zip(clusters, self._store.read_clusters(space.keys, held), strict=True):
            if raw:
                records = np.frombuffer(raw[2], LAYOUT)
                sequences, vectors = records["sequence"].copy(), records["vector"].copy()
                read.append(Contents(cluster, State.unpack(raw[0]), sequences, vectors))
        return read

    def _plan(self, space: Space, contents: Contents) -> "Plan | None":
        state, limit = contents.state, self._settings.cluster_limit
        space.table.refresh()
        if contents.cluster not in space.table:
            return None
        neighbours = self._with_room(space, contents)
        if state.live < limit // 8 and neighbours:
            return _merge(space, contents, neighbours)
        if state.live >= limit:
            return _split(space, contents, neighbours)
        if state.length >= limit or state.live * 2 < state.length:
            return _compact(contents)
        return None

    def _with_room(self, space: Space, contents: Contents) -> list[int]:
        """The nearest clusters that could take all of a cluster's records."""
        near = space.table.nearest_to(contents.cluster, NEIGHBOURS)
        if not near:
            return []
        states = self._store.command("HMGET", space.keys.clusters, *map(CLUSTER.pack, near))
        most = self._settings.hard_limit - contents.state.live - UNPLANNED
        return [
            cluster
            for cluster, state in zip(near, states, strict=True)
            if state and State.unpack(state).length <= most
        ]

    def _attract(self, space: Space, fresh: list[int]) -> None:
        """Move records of neighbouring clusters that are now nearer to a new centroid."""
        if len(fresh) < 2 or not all(cluster in space.table for cluster in fresh):
            return
        near = {n for cluster in fresh for n in space.table.nearest_to(cluster, NEIGHBOURS)}
        token = secrets.token_hex(16)
        plans = [
            plan
            for contents in self._read_all(space, sorted(near - set(fresh)))
            if (plan := _moves(space, contents, fresh))
        ]
        locks = self._store.commands(
            [self._lock(space, plan.contents.cluster, token) for plan in plans]
        )
        locked = [plan for plan, lock in zip(plans, locks, strict=True) if lock]
        self._step("attracting")
        self._store.scripts(
            "rehome",
            [(space.keys, plan.arguments(self._settings, token)) for plan in locked],
        )
        self._step("attracted")
        self._store.scripts(
            "release",
            [(space.keys, [CLUSTER.pack(plan.contents.cluster), token, 0]) for plan in locked],
        )

    def _lock(self, space: Space, cluster: int, token: str) -> tuple[Argument, ...]:
        milliseconds = int(self._settings.lock_seconds * 1000)
        return ("SET", space.keys.lock(cluster), token, "NX", "PX", milliseconds)


@dataclass(frozen=True)
class Plan:
    """Where each record of a cluster goes: 1… counts `existing` clusters, then `new` centroids."""

    contents: Contents
    existing: list[int]
    new: list[Vectors]
    places: npt.NDArray[np.uint8]
    retire: bool = True

    def arguments(self, settings: IndexSettings, token: str) -> list[Argument]:
        """The arguments of the `rehome` script, which does it."""
        outputs = b"".join(CLUSTER.pack(cluster) + bytes(CENTROID) for cluster in self.existing)
        outputs += b"".join(CLUSTER.pack(0) + centroid.tobytes() for centroid in self.new)
        return [
            CLUSTER.pack(self.contents.cluster),
            self.contents.state.epoch,
            token,
            int(self.retire),
            outputs,
            self.places.tobytes(),
            settings.cluster_limit,
            settings.hard_limit,
            UNPLANNED,
        ]


def _moves(space: Space, contents: Contents, fresh: list[int]) -> Plan | None:
    """What leaves a cluster for new ones beside it."""
    if contents.cluster not in space.table:
        return None
    centroids = space.table.directions_of([contents.cluster, *fresh])
    near = inner(directions_of(contents.vectors), centroids)
    near[:, 0] += NEARER
    nearest = near.argmax(axis=1)
    nearest[contents.sequences == 0] = 0
    if not nearest.any():
        return None
    return Plan(contents, fresh, [], nearest.astype(np.uint8), retire=False)


def _merge(space: Space, contents: Contents, neighbours: list[int]) -> Plan:
    near = inner(directions_of(contents.vectors), space.table.directions_of(neighbours))
    nearest = near.argmax(axis=1)
    return Plan(contents, neighbours, [], _places(contents, nearest))


def _compact(contents: Contents) -> Plan:
    living = directions_of(contents.vectors[contents.living])
    places = _places(contents, np.zeros(len(contents.sequences), np.intp))
    return Plan(contents, [], [_centroid(living)], places)


def _split(space: Space, contents: Contents, neighbours: list[int]) -> Plan:
    rows = directions_of(contents.vectors[contents.living])
    sides = two_means(rows, contents.sequences[contents.living])
    new = [_centroid(rows[sides == side]) for side in (0, 1)]
    choices = np.concatenate([space.table.directions_of(neighbours), directions_of(np.stack(new))])
    # Both halves stay as large as 2-means made them, but for what lies nearer to a neighbour.
    near = inner(rows, choices[: len(neighbours)])
    own = (rows * choices[len(neighbours) + sides]).sum(axis=1)
    nearest = np.full(len(contents.sequences), -1, np.intp)
    nearest[contents.living] = len(neighbours) + sides
    if len(neighbours):
        leaving = near.max(axis=1) > own + NEARER
        nearest[contents.living[leaving]] = near[leaving].argmax(axis=1)
    return Plan(contents, neighbours, new, _places(contents, nearest))


def two_means(rows: Rows, sequences: npt.NDArray[np.uint64]) -> npt.NDArray[np.intp]:
    """Divide unit rows (n, 128) in two by spherical 2-means; answers 0 or 1 for each.

    The start is the two ends of the widest direction, so the result depends on the rows alone.
    Where one side would be tiny, or all rows are alike, the cut is at the median: the earlier
    sequences, among equals, stay together.
    """
    along = inner(rows, _widest(rows)[None])[:, 0]
    sides: npt.NDArray[np.intp] = np.zeros(len(rows), np.intp)
    ends = rows[[int(along.argmin()), int(along.argmax())]]
    for _ in range(ROUNDS):
        sides = inner(rows, ends).argmax(axis=1)
        if sides.min() == sides.max():
            break
        ends = np.stack([_mean(rows[sides == side]) for side in (0, 1)])
    smaller = min(int((sides == 0).sum()), int((sides == 1).sum()))
    if smaller < SMALLEST_SHARE * len(rows):
        order = np.lexsort((sequences, np.round(along, 4)))
        sides = np.zeros(len(rows), np.intp)
        sides[order[len(rows) // 2 :]] = 1
    return sides


def _widest(rows: Rows) -> Rows:
    """The direction in which unit rows spread most, by power iteration from the outermost row."""
    centred = rows - rows.mean(axis=0)
    axis: Rows = centred[int((centred * centred).sum(axis=1).argmax())]
    for _ in range(ROUNDS):
        axis = inner(inner(centred, axis[None]).T, centred.T)[0]
        length = float(np.sqrt((axis * axis).sum()))
        if length == 0:
            return axis
        axis /= length
    return axis


def _mean(rows: Rows) -> Rows:
    mean: Rows = rows.mean(axis=0)
    length = float(np.sqrt((mean * mean).sum()))
    if length > 0:
        mean /= length
    return mean


def _centroid(rows: Rows) -> Vectors:
    mean = rows.mean(axis=0)
    return quantize(mean[None])[0] if np.abs(mean).max() > 0 else np.zeros(CENTROID, np.int8)


def _places(contents: Contents, outputs: npt.NDArray[np.intp]) -> npt.NDArray[np.uint8]:
    places = (outputs + 1).astype(np.uint8)
    places[contents.sequences == 0] = 0
    return places
