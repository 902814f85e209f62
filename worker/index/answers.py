"""What the index is asked and what it answers.

Owns the value types of the index's interface and its settings. It must not know Redis.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from worker.vectors import Vectors

COUNTS = (
    "first_cluster_limit",
    "least_probes",
    "matches",
    "cache_bytes",
    "tail_records",
    "script_arrivals",
    "open_namespaces",
    "recent_writes",
    "place_attempts",
)
UNPLANNED = 64
"""At most so many, however large clusters may be: for each it computes two products."""
FEW_CLUSTERS = 4
"""Up to so many, clusters may be as large as `first_cluster_limit`."""
FALLING = 0.4
"""The power of their number with which the limit falls from there on."""
Outcome = Literal["placed", "exact", "seen", "conflict"]


class Limits(NamedTuple):
    """How many records the clusters of a namespace may have."""

    due: int
    """From so many a cluster is to be split."""
    hard: int
    """At so many a cluster takes no more until it is split; bounds every script."""

    @property
    def unplanned(self) -> int:
        """Records appended meanwhile that the script of a plan may place by itself."""
        return min(UNPLANNED, self.due // 2)


@dataclass(frozen=True)
class IndexSettings:
    """Limits and choices of the index; each is a setting of the worker."""

    threshold: float
    """Similarity from which a neighbour is a match, in (-1, 1]."""
    matches: int = 5
    """Neighbours an answer lists at most."""
    cluster_limit: int = 256
    """Records in a cluster from which it is due for a split, where there are many clusters."""
    first_cluster_limit: int = 4096
    """The same where there are few; up to `cluster_limit` it has no effect. See `limits`."""
    probes: int = 64
    """Clusters looked into for one image at most; 0 means all of them."""
    probe_margin: float = 0.18
    """A cluster whose centroid is less similar than the nearest one's by more is left out."""
    least_probes: int = 4
    """Clusters looked into however far away they are, where there are so many."""
    tidy_clusters: int = 4
    """Clusters whose records are put where they belong, in turn, as one is split or merged."""
    cache_bytes: int = 1 << 29
    """Bytes of cluster records a worker keeps in memory."""
    tail_records: int = 8192
    """Records one script may answer with; a worker further behind loads the clusters first."""
    script_arrivals: int = 64
    """Images one script takes; more make it cheaper an image and block Redis for longer."""
    open_namespaces: int = 256
    """Namespaces whose centroid tables a worker keeps in memory."""
    lock_seconds: float = 30.0
    """Life of a maintenance lock; a worker that dies holding one delays that cluster so long."""
    recent_writes: int = 16_384
    """Writes a worker remembers, so that it can tell which of them a fail-over of Redis lost."""
    place_attempts: int = 64
    """Times an arrival follows moved clusters before the call fails as an infrastructure error."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        if not -1.0 < self.threshold <= 1.0:
            raise ValueError(f"threshold must lie in (-1, 1], not {self.threshold}")
        if self.cluster_limit < 8:
            raise ValueError(f"cluster_limit must be at least 8, not {self.cluster_limit}")
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if self.lock_seconds <= 0:
            raise ValueError(f"lock_seconds must be positive, not {self.lock_seconds}")
        if min(self.probes, self.probe_margin, self.tidy_clusters) < 0:
            raise ValueError("probes, probe_margin and tidy_clusters must not be negative")

    def limits(self, clusters: int) -> Limits:
        """What applies in a namespace of so many clusters.

        To compare a few thousand vectors takes less than to divide them, and each split has others
        ask again. So clusters may be large at first: 4,096 up to 4 clusters, 2,352 at 16, 1,130 at
        100, 256 from 4,057 on. The limit falls less steeply than their number grows, so they do not
        become due all at once.
        """
        falling = self.first_cluster_limit * (FEW_CLUSTERS / max(clusters, FEW_CLUSTERS)) ** FALLING
        due = max(self.cluster_limit, int(falling))
        return Limits(due, max(4 * self.cluster_limit, 2 * due))


@dataclass(frozen=True)
class Arrival:
    """One image to recognise or place.

    `sha256` is the full digest of its bytes, `position` the partition and offset of its event,
    `vector` an int8 row (128,), `topic` the id of the event's topic where it has one; `store=False`
    asks without leaving a trace.
    """

    namespace: str
    image_id: str
    sha256: bytes
    store: bool
    position: tuple[int, int]
    vector: Vectors | None = None
    topic: str = ""


class Neighbour(NamedTuple):
    """A stored image and its similarity to the one asked about."""

    image_id: str
    sequence: int
    similarity: float


class Answer(NamedTuple):
    """What the index says to an arrival; neighbours always have a smaller sequence.

    - placed: compared; `earliest` is the match with the smallest sequence, `best` the most similar
      stored image whether it matches or not, `matches` the most similar ones that do.
    - exact: `exact_of` has the same bytes; nothing was compared.
    - seen: settled before; `verdict` holds the bytes kept then.
    - conflict: the id is stored with other bytes.

    `sequence` is the image's own; a check, which gets none, is told None.
    """

    outcome: Outcome
    sequence: int | None = None
    verdict: bytes | None = None
    exact_of: Neighbour | None = None
    earliest: Neighbour | None = None
    best: Neighbour | None = None
    matches: tuple[Neighbour, ...] = ()
    clusters_probed: int = 0
    vectors_compared: int = 0
    cluster_records: int = 0  # of the nearest cluster, where it is stored
    truncated: bool = False
