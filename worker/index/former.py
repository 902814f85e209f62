"""What `fsck` checks of ids that live more than once: the events of their former lives.

Owns reading them, by the layout in `keys`. It reads only, and must not know how lives end.
"""

from collections.abc import Iterator, Mapping, Sequence

from worker.index.keys import IMAGE, PAST, Keys
from worker.index.store import Store

BEGUN = slice(17, 27)
"""Partition and offset in an image's record, as they are in the entries."""


def unremembered(
    store: Store, keys: Keys, lives: Sequence[tuple[int, bytes]], records: Mapping[int, bytes]
) -> list[str]:
    """Former lives (sequence, digest of the id) that the event they began with does not lead to.

    Ids without any entry were written by a version that kept none: the scripts make up for it.
    """
    asked = [
        (sequence, keys.past(digest), records[sequence][BEGUN])
        for sequence, digest in lives
        if len(records.get(sequence, b"")) >= IMAGE.size
    ]
    replies = store.commands(
        [
            ("ZRANGEBYLEX", key, b"[" + at, b"[" + at[:4] + b"\xff" * 15, "LIMIT", 0, 1)
            for _, key, at in asked
        ]
    )
    there = store.commands([("EXISTS", key) for _, key, _ in asked])
    return [
        f"the event sequence {sequence} began with does not lead to it"
        for (sequence, _, _), reply, some in zip(asked, replies, there, strict=True)
        if some and [_sequence(member) for member in reply] != [sequence]
    ]


def past(store: Store, keys: Keys, page: Sequence[bytes]) -> Iterator[tuple[int, bytes, str]]:
    """Of some keys, those of former lives: each sequence in them, the digest, and a complaint."""
    begin = keys.past(b"")
    names = [name for name in page if name.startswith(begin)]
    replies = store.commands([("ZRANGE", name, 0, -1) for name in names])
    for name, members in zip(names, replies, strict=True):
        for member in members:
            sequence = _sequence(member)
            said = f"an id's event leads to sequence {sequence}, which has another id"
            yield sequence, name[len(begin) :], said


def _sequence(member: bytes) -> int:
    """The life an event was of; 0, which is nobody's, where it is no such entry."""
    return int(PAST.unpack(member)[-1]) if len(member) == PAST.size else 0
