"""What `fsck` checks of what leads to images: lookups, lists of copies, events of former lives.

Owns that each entry leads to an image it is true of. It reads only, and rests on what was noted of
the images before.
"""

from collections.abc import Iterator

from worker.index.former import past
from worker.index.fsck_notes import Notes, end, number
from worker.index.keys import COPY, LIVE, LOAD

PAGE = 128
"""Buckets checked at once."""


def check_lookups(notes: Notes) -> None:
    """Check all entries of the lookups."""
    for kind in ("id:", "sha:"):
        for page in _pages(notes, kind):
            for bucket, entries in page:
                for name, value in entries.items():
                    if notes.bucket(kind, name, notes.last) != bucket:
                        notes.say(f"{bucket} holds an entry of another bucket")
                    _check_entry(notes, kind, bucket, name, value)


def check_lists(notes: Notes) -> None:
    """Check all lists of copies and of the events of former lives."""
    begin = f"{notes.keys.prefix}copies:".encode()
    for page in notes.store.pages(notes.keys.prefix):
        lists = [(name, name[len(begin) :]) for name in page if name.startswith(begin)]
        _check_copies(notes, lists)
        for sequence, each, problem in past(notes.store, notes.keys, page):
            if sequence > notes.last:
                notes.say_unless_handed_out(problem, sequence)
            elif notes.ids[sequence] != end(each):
                notes.say(problem)


def _pages(notes: Notes, kind: str) -> Iterator[list[tuple[str, dict[bytes, bytes]]]]:
    count = notes.last // LOAD + 1
    for start in range(0, count, PAGE):
        numbers = range(start, min(start + PAGE, count))
        names = [f"{notes.keys.prefix}{kind}{bucket}" for bucket in numbers]
        replies = notes.store.commands([("HGETALL", name) for name in names])
        yield list(zip(names, replies, strict=True))


def _check_entry(notes: Notes, kind: str, bucket: str, name: bytes, value: bytes) -> None:
    sequence = number(value)
    problem = f"{bucket} leads to sequence {value.decode(errors='backslashreplace')}"
    if sequence is None or sequence < 1:
        notes.say(problem)
    elif sequence > notes.last:
        notes.say_unless_handed_out(problem, sequence)
    elif kind == "id:" and notes.ids[sequence] != end(name):
        notes.say(f"{problem}, which has another id")
    elif kind == "sha:" and not notes.is_one(LIVE, sequence, name):
        notes.say(f"{problem}, which is no living original of these bytes")


def _check_copies(notes: Notes, lists: list[tuple[bytes, bytes]]) -> None:
    """Each list of copies, named by their bytes, holds only those."""
    replies = notes.store.commands([("ZRANGE", name, 0, -1) for name, _ in lists])
    for (_, sha), members in zip(lists, replies, strict=True):
        for member in members:
            sequence = number(member)
            told = member.decode(errors="backslashreplace")
            problem = f"sequence {told} is listed as a copy of bytes it has not"
            if sequence is None:
                notes.say(problem)
            elif sequence > notes.last:
                notes.say_unless_handed_out(problem, sequence)
            elif not notes.is_one(COPY, sequence, sha):
                notes.say(problem)
