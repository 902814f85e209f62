"""Plans of upkeep: which record of a cluster goes where. Pure but for the centroid table.

Owns how a cluster is cut in two and to which centroid a record belongs. It must not know Redis,
locks or when upkeep is due.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from worker.index.answers import Limits
from worker.index.centroids import Table
from worker.index.kernel import inner
from worker.index.keys import CENTROID, CLUSTER, State
from worker.index.store import Argument
from worker.vectors import Vectors, directions_of, quantize

ROUNDS = 8
"""Iterations of 2-means; boundaries move little after a few."""
SMALLEST_SHARE = 0.1
"""A split leaving less than this on one side is cut at the median instead."""
NEARER = 1e-5
"""A record moves only to a centroid this much more similar: rounding alone moves nothing."""
OUTPUTS = 250
"""Clusters a plan moves records to: it has a byte for each record, and needs two for new ones."""

Rows = npt.NDArray[np.float32]
Homes = npt.NDArray[np.int64]
"""The cluster of each record; 0: it stays."""


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


@dataclass(frozen=True)
class Plan:
    """Where each record of a cluster goes: 1… counts `existing` clusters, then `new` centroids."""

    contents: Contents
    existing: list[int]
    new: list[Vectors]
    places: npt.NDArray[np.uint8]
    retire: bool = True

    def arguments(self, limits: Limits, token: str) -> list[Argument]:
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
            limits.due,
            limits.hard,
            limits.unplanned,
        ]


def attracted(table: Table, contents: Contents, fresh: list[int]) -> Plan | None:
    """What leaves a cluster for new ones beside it; None when nothing does."""
    among = [contents.cluster, *fresh]
    with table.steady():
        if not all(cluster in table for cluster in among):
            return None
        directions = table.directions_of(among)
    near = inner(directions_of(contents.vectors), directions)
    near[:, 0] += NEARER
    return _leaving(contents, np.array([0, *fresh])[near.argmax(axis=1)])


def strays(table: Table, contents: Contents) -> Plan | None:
    """What leaves a cluster for any others that are nearer; None when all is where it belongs."""
    with table.steady():
        if contents.cluster not in table:
            return None
        homes, near = table.nearest(contents.vectors, without=contents.cluster)
        direction = table.directions_of([contents.cluster])
    own = inner(directions_of(contents.vectors), direction)[:, 0]
    return _leaving(contents, np.where(near > own + NEARER, homes, 0))


def _leaving(contents: Contents, homes: Homes) -> Plan | None:
    homes[contents.sequences == 0] = 0
    existing, places = _outputs(homes)
    return Plan(contents, existing, [], places, retire=False) if existing else None


def merge(table: Table, contents: Contents, neighbours: list[int]) -> Plan:
    """Everything goes to the nearest of the neighbours (at most OUTPUTS)."""
    near = inner(directions_of(contents.vectors), table.directions_of(neighbours))
    homes = np.array(neighbours)[near.argmax(axis=1)]
    homes[contents.sequences == 0] = 0
    existing, places = _outputs(homes)
    return Plan(contents, existing, [], places)


def compact(table: Table, contents: Contents) -> Plan:
    """Everything that lives goes to one new cluster with the same centroid.

    Measured anew, it would be nearer to some records of others and further from some of its own.
    """
    places = (contents.sequences > 0).astype(np.uint8)
    return Plan(contents, [], [table.centroid(contents.cluster)], places)


def split(table: Table, contents: Contents, full: Collection[int] = ()) -> Plan:
    """Two new clusters, but for what lies nearer to another one that is not `full`."""
    vectors = contents.vectors[contents.living]
    rows = directions_of(vectors)
    sides = two_means(rows, contents.sequences[contents.living])
    new = [_centroid(rows[sides == side]) for side in (0, 1)]
    # Both halves stay as large as 2-means made them, but for what lies nearer to another cluster.
    own = (rows * directions_of(np.stack(new))[sides]).sum(axis=1)
    homes, near = table.nearest(vectors, without=contents.cluster)
    homes[(near <= own + NEARER) | np.isin(homes, list(full))] = 0
    existing, gone = _outputs(homes)
    places = np.zeros(len(contents.sequences), np.uint8)
    places[contents.living] = np.where(gone > 0, gone, len(existing) + 1 + sides)
    return Plan(contents, existing, new, places)


def _outputs(homes: Homes) -> tuple[list[int], npt.NDArray[np.uint8]]:
    """The clusters (OUTPUTS at most, the rarest left out) and each record's place among them.

    Places count from 1; a record whose home is 0, or left out, has 0.
    """
    clusters, counts = np.unique(homes[homes > 0], return_counts=True)
    taken = np.sort(clusters[np.argsort(-counts, kind="stable")[:OUTPUTS]])
    places = np.where(np.isin(homes, taken), np.searchsorted(taken, homes) + 1, 0)
    return taken.tolist(), places.astype(np.uint8)


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
