"""The names of a generation's keys: types they must not have, and keys that belong to nothing.

Owns which names there may be, and of which type, by the layout in `keys`. It reads only, and must
not know what is in them.
"""

from collections.abc import Sequence

from worker.index.fsck_notes import counter
from worker.index.keys import CHUNK, CLUSTER, LOAD, SPAN, STATE, Keys, State
from worker.index.store import Store

ALONE = {"meta": "hash", "centroids": "hash", "clusters": "hash", "log": "stream", "due": "set"}
BUCKETS = {b"rec": SPAN, b"id": LOAD, b"sha": LOAD}
"""Kinds of buckets, and the sequences that make one more."""
LISTS = {b"copies", b"lock", b"past"}
"""Kinds of which there may be one for any image, id or cluster."""
TYPES = {b"c": "string", b"lock": "string", b"copies": "zset", b"past": "zset"}
TYPES |= dict.fromkeys(BUCKETS, "hash")
"""Of the keys whose names have more parts."""


def check_names(store: Store, keys: Keys) -> tuple[list[str], list[str]]:
    """All keys of a wrong type; and those that belong to nothing, as far as types could tell."""
    alone = [f"{keys.prefix}{name}".encode() for name in ALONE]
    mistyped, strays = _mistyped(store, keys, alone), list[str]()
    readable = not mistyped
    for page in store.pages(keys.prefix):
        mistyped += _mistyped(store, keys, [name for name in page if name not in alone])
        if readable:
            strays += [
                f"{_shown(name)} belongs to nothing that is stored"
                for name in _strays(store, keys, page)
            ]
    return mistyped, strays


def _mistyped(store: Store, keys: Keys, names: Sequence[bytes]) -> list[str]:
    kinds = [kind.decode() for kind in store.commands([("TYPE", name) for name in names])]
    wanted = [_type(_parts(keys, name)) for name in names]
    return [
        f"{_shown(name)} is a {kind}, not a {right}"
        for name, kind, right in zip(names, kinds, wanted, strict=True)
        if right is not None and kind not in ("none", right)  # none: it was removed meanwhile
    ]


def _type(part: list[bytes]) -> str | None:
    """None of what belongs to nothing whatever it is."""
    kind, *rest = part
    return TYPES.get(kind) if rest else ALONE.get(kind.decode(errors="replace"))


def _strays(store: Store, keys: Keys, names: Sequence[bytes]) -> list[bytes]:
    """Answer which of some keys, seen a moment ago, belong to nothing.

    What they may belong to is read after they were seen, and only grows; only what retires has its
    keys removed, so then they are looked for again.
    """
    parts = {name: _parts(keys, name) for name in names}
    last = counter(store, keys, "sequence") or 0
    states = _states(store, keys, [part[1] for part in parts.values() if _is_chunk(part)])
    suspects = [name for name, part in parts.items() if not _belongs(part, last, states)]
    replies = store.commands([("EXISTS", name) for name in suspects])
    return [name for name, there in zip(suspects, replies, strict=True) if there]


def _parts(keys: Keys, name: bytes) -> list[bytes]:
    return name[len(keys.prefix.encode()) :].split(b":")


def _shown(name: bytes) -> str:
    return name.decode(errors="replace")


def _is_chunk(part: list[bytes]) -> bool:
    return part[0] == b"c" and len(part) == 3 and all(map(_is_number, part[1:]))


def _is_number(text: bytes) -> bool:
    return text.isdigit() and len(text) <= 10 and b"%d" % int(text) == text and int(text) < 1 << 32


def _states(store: Store, keys: Keys, clusters: list[bytes]) -> dict[bytes, bytes]:
    """Of the clusters that are alive."""
    fields = [CLUSTER.pack(int(cluster)) for cluster in clusters]
    replies = store.commands([("HGET", keys.clusters, field) for field in fields])
    return {c: reply for c, reply in zip(clusters, replies, strict=True) if reply is not None}


def _belongs(part: list[bytes], last: int, states: dict[bytes, bytes]) -> bool:
    kind, *rest = part
    if _is_chunk(part):
        state = states.get(rest[0], STATE.pack(0, 0, 0))
        # A state of another size is told of as such; it says of no chunk that there is none.
        return len(state) != STATE.size or int(rest[1]) * CHUNK < State.unpack(state).length
    if kind in BUCKETS:
        return len(rest) == 1 and _is_number(rest[0]) and int(rest[0]) <= last // BUCKETS[kind]
    return kind in LISTS if rest else kind.decode(errors="replace") in ALONE
