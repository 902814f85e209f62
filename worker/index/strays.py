"""Keys of a generation that belong to nothing it holds.

Owns which names there may be, by the layout in `keys`. It reads only, and must not know what is in
them.
"""

from collections.abc import Sequence

from worker.index.keys import CHUNK, CLUSTER, LOAD, SPAN, Keys, State
from worker.index.store import Store

ALONE = {b"meta", b"centroids", b"clusters", b"log", b"due"}
BUCKETS = {b"rec": SPAN, b"id": LOAD, b"sha": LOAD}
"""Kinds of buckets, and the sequences that make one more."""
LISTS = {b"copies", b"lock", b"past"}
"""Kinds of which there may be one for any image, id or cluster."""


def strays(store: Store, keys: Keys, names: Sequence[bytes]) -> list[bytes]:
    """Answer which of some keys, seen a moment ago, belong to nothing.

    What they may belong to is read after they were seen, and only grows; only what retires has its
    keys removed, so then they are looked for again.
    """
    prefix = len(keys.prefix.encode())
    parts = {name: name[prefix:].split(b":") for name in names}
    last = int(store.command("HGET", keys.meta, "sequence") or 0)
    states = _states(store, keys, [part[1] for part in parts.values() if _is_chunk(part)])
    suspects = [name for name, part in parts.items() if not _belongs(part, last, states)]
    replies = store.commands([("EXISTS", name) for name in suspects])
    return [name for name, there in zip(suspects, replies, strict=True) if there]


def _is_chunk(part: list[bytes]) -> bool:
    return part[0] == b"c" and len(part) == 3 and all(map(_is_number, part[1:]))


def _is_number(text: bytes) -> bool:
    return text.isdigit() and b"%d" % int(text) == text and int(text) < 1 << 32


def _states(store: Store, keys: Keys, clusters: list[bytes]) -> dict[bytes, State]:
    """Of the clusters that are alive."""
    fields = [CLUSTER.pack(int(cluster)) for cluster in clusters]
    replies = store.commands([("HGET", keys.clusters, field) for field in fields])
    return {c: State.unpack(reply) for c, reply in zip(clusters, replies, strict=True) if reply}


def _belongs(part: list[bytes], last: int, states: dict[bytes, State]) -> bool:
    kind, *rest = part
    if _is_chunk(part):
        state = states.get(rest[0])
        return state is not None and int(rest[1]) * CHUNK < state.length
    if kind in BUCKETS:
        return len(rest) == 1 and _is_number(rest[0]) and int(rest[0]) <= last // BUCKETS[kind]
    return kind in (LISTS if rest else ALONE)
