"""The `arrive` script's words: how arrivals are asked together, and how its answer is read.

Owns the packing, and which arrivals one script may take: so many at most, so that nobody is blocked
for more than a few milliseconds, and never two of one id or of the same bytes, because the script
looks everything up before it writes. It must not know what is done with the answers.
"""

import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from worker.index.answers import Answer, Arrival, IndexSettings, Neighbour
from worker.index.cache import Prefix
from worker.index.keys import DIGEST, RECORD, digest, read_id
from worker.index.space import Space
from worker.index.store import Argument, Store

PROBED = 4096
"""Probed clusters one script takes at most, unless a single arrival has more."""
OUTCOMES = (
    "new",
    "seen",
    "conflict",
    "exact",
    "placed",
    "again",
    "moved",
    "behind",
    "full",
    "held",
)
STALE = "stale"
"""The outcome where the script answered nothing."""
WAITING = frozenset(("moved", "behind", "full", "held", STALE))
"""Outcomes of arrivals that the script has done nothing for: they are to be asked again."""

HEADER = struct.Struct(">BQIII")
ARRIVAL = struct.Struct(">B16s16sIHII")
LENGTH = struct.Struct(">I")
ANSWER = struct.Struct(">BQQI")
TAIL = struct.Struct(">4s12sII")
"""What goes to the `arrive` script and what comes back; see there."""


class Reply(NamedTuple):
    """What the `arrive` script said to one arrival; see there."""

    outcome: str
    version: int
    sequence: int
    text: bytes
    origin: int


class Asked(NamedTuple):
    """An arrival and the clusters it probes, home first; none: it is only recognised."""

    arrival: Arrival
    probes: Sequence[int] = ()


class Told(NamedTuple):
    """What one script said to its arrivals, and of clusters not as the caller holds them."""

    replies: list[Reply]
    tails: bytes


def runs(
    asked: Sequence[Asked], most: int, most_clusters: int = PROBED
) -> Iterator[Sequence[Asked]]:
    """Divide arrivals, in order, into what one script may take."""
    first = 0
    ids: set[str] = set()
    digests: set[bytes] = set()
    clusters: set[int] = set()
    for at, one in enumerate(asked):
        arrival = one.arrival
        repeats = arrival.image_id in ids or arrival.sha256[:DIGEST] in digests
        clusters.update(one.probes)
        if at > first and (repeats or at - first >= most or len(clusters) > most_clusters):
            yield asked[first:at]
            first, ids, digests, clusters = at, set(), set(), set(one.probes)
        ids.add(arrival.image_id)
        digests.add(arrival.sha256[:DIGEST])
    if asked:
        yield asked[first:]


def ask(
    store: Store,
    space: Space,
    settings: IndexSettings,
    parts: Sequence[Sequence[Asked]],
    prefixes: Mapping[int, Prefix],
    *,
    version: int,
) -> list[Told]:
    """Run the script once for each part, in one pipeline.

    `prefixes` holds every cluster probed, `version` is that of the table they were chosen by.
    """
    calls = [(space.keys, arguments(space, part, settings, prefixes, version)) for part in parts]
    return [
        read(raw, len(part))
        for raw, part in zip(store.scripts("arrive", calls), parts, strict=True)
    ]


def arguments(
    space: Space,
    asked: Sequence[Asked],
    settings: IndexSettings,
    prefixes: Mapping[int, Prefix],
    version: int,
) -> list[Argument]:
    """The arguments of the `arrive` script."""
    union = dict.fromkeys(cluster for one in asked for cluster in one.probes)
    places = {cluster: place for place, cluster in enumerate(union, 1)}
    held = [prefixes[cluster] for cluster in union]
    limits = settings.limits(len(space.table))
    header = HEADER.pack(
        bool(union),
        version,
        settings.tail_records,
        limits.due,
        limits.hard,
    )
    return [
        header,
        b"".join([prefix.cluster + prefix.state for prefix in held]),
        b"".join([_packed(space, one, places) for one in asked]),
    ]


def _packed(space: Space, one: Asked, places: dict[int, int]) -> bytes:
    arrival = one.arrival
    partition, offset = arrival.position
    name = arrival.image_id.encode()
    vector = b"" if arrival.vector is None or not one.probes else arrival.vector.tobytes()
    probes = struct.pack(f">{len(one.probes)}I", *[places[cluster] for cluster in one.probes])
    fixed = ARRIVAL.pack(
        arrival.store,
        digest(arrival.image_id),
        arrival.sha256[:DIGEST],
        space.partition(arrival.topic, partition),
        offset >> 32,
        offset & 0xFFFFFFFF,
        len(name),
    )
    return b"".join(
        (fixed, name, LENGTH.pack(len(vector)), vector, LENGTH.pack(len(probes)), probes)
    )


def read(raw: Sequence[Any], count: int) -> Told:
    """Read what the script returned for `count` arrivals."""
    if not raw:
        return Told([Reply(STALE, 0, 0, b"", 0)] * count, b"")
    version, answers, tails = raw
    replies, at = [], 0
    for _ in range(count):
        outcome, sequence, origin, length = ANSWER.unpack_from(answers, at)
        at += ANSWER.size + length
        replies.append(
            Reply(OUTCOMES[outcome], version, sequence, answers[at - length : at], origin)
        )
    return Told(replies, tails)


def each_tail(tails: bytes) -> Iterable[tuple[bytes, bytes, int, bytes]]:
    """Cluster, state, index of the first record, records."""
    at = 0
    while at < len(tails):
        cluster, state, first, count = TAIL.unpack_from(tails, at)
        end = at + TAIL.size + count * RECORD
        yield cluster, state, first, tails[at + TAIL.size : end]
        at = end


def known(reply: Reply, arrival: Arrival) -> Answer | None:
    """The answer where nothing needs to be compared, else None."""
    sequence = reply.sequence if arrival.store else None
    if reply.outcome == "seen":
        return Answer("seen", sequence, verdict=reply.text)
    if reply.outcome == "conflict":
        return Answer("conflict", sequence)
    if reply.outcome == "exact":
        origin = Neighbour(read_id(reply.text, reply.origin), reply.origin, 1.0)
        return Answer("exact", sequence, exact_of=origin)
    return None
