"""What `fsck` checks of images: their records, ids and verdicts, and that lookups lead to them.

Owns what must hold of each sequence handed out. It reads only; vectors were looked at before, and
it must not know clusters.
"""

from worker import decide
from worker.index.former import unremembered
from worker.index.fsck_notes import Named, Notes, end, number
from worker.index.keys import COPY, DELETED, IMAGE, LIVE, REMOVAL, SPAN, digest

PAGE = 128
"""Buckets checked at once: up to 4,096 images, some MB."""
SIZES = {LIVE: IMAGE.size, COPY: IMAGE.size, DELETED: IMAGE.size + REMOVAL.size}
"""Of records, by their kind, which is their first byte."""


def check_images(notes: Notes) -> None:
    """Check all sequences; notes kind, bytes and id of each."""
    for first in range(0, notes.last + 1, SPAN * PAGE):
        _check_page(notes, first)


def _check_page(notes: Notes, first: int) -> None:
    buckets = range(first // SPAN, min(first // SPAN + PAGE, notes.last // SPAN + 1))
    asked = [("HGETALL", notes.keys.record(bucket * SPAN)[0]) for bucket in buckets]
    records: Named = []
    names: Named = []
    for bucket, fields in zip(buckets, notes.store.commands(asked), strict=True):
        for offset in range(SPAN):
            sequence = bucket * SPAN + offset
            if not 0 < sequence <= notes.last:
                continue
            record, name, verdict, _ = (
                fields.pop(b"%d" % (offset * 4 + n), None) for n in range(4)
            )
            if record is None or name is None:
                notes.say(f"sequence {sequence} has no {'record' if record is None else 'id'}")
            if record is not None and name is not None:
                records.append((sequence, record))
            if name is not None:
                names.append((sequence, name))
            if verdict is not None and not _is_readable(verdict, sequence):
                notes.say(f"the verdict of sequence {sequence} cannot be read")
        _check_rest(notes, bucket, fields)
    _check_records(notes, records)
    former = _check_names(notes, names)
    notes.say(*unremembered(notes.store, notes.keys, former, dict(records)))


def _is_readable(verdict: bytes, sequence: int) -> bool:
    """Whether a verdict can be told again: it names images that came before."""
    try:
        named = decide.unpack(verdict).sequences()
    except ValueError:
        return False
    return all(0 < each < sequence for each in named)


def _check_rest(notes: Notes, bucket: int, fields: dict[bytes, bytes]) -> None:
    """Fields that are of no sequence handed out; at the end they may be of the next ones."""
    for name in fields:
        field = number(name)
        at = SPAN if field is None else field // 4
        problem = f"bucket {bucket} of records has a field {name!r} of no sequence"
        if at < SPAN and (sequence := bucket * SPAN + at) > 0:
            notes.say_unless_handed_out(problem, sequence)
        else:
            notes.say(problem)


def _check_records(notes: Notes, records: Named) -> None:
    originals: Named = []
    copies: Named = []
    for sequence, packed in records:
        if not packed or SIZES.get(packed[0]) != len(packed):
            begin = packed[:1]
            notes.say(
                f"the record of sequence {sequence} is none: {len(packed)} bytes, {begin!r} …"
            )
            continue
        kind, sha, _, _, _, _, home = IMAGE.unpack_from(packed)
        notes.kinds[sequence], notes.shas[sequence] = kind, end(sha)
        found = int(notes.found[sequence])
        if kind == LIVE:
            originals.append((sequence, sha))
            if found != home:
                notes.say(f"sequence {sequence} says cluster {home}; it is in {found}")
        elif found:
            notes.say(f"sequence {sequence} is no living original but has a vector in {found}")
        if kind == COPY:
            copies.append((sequence, sha))
    holders = notes.look_up("sha:", [sha for _, sha in originals])
    for (sequence, _), holder in zip(originals, holders, strict=True):
        if holder != sequence:
            notes.say(f"the bytes of sequence {sequence} lead to {holder}")
    _check_copies(notes, copies)


def _check_copies(notes: Notes, copies: Named) -> None:
    """Each has an original, and is listed with it: it inherits the vector when its turn comes."""
    holders = notes.look_up("sha:", [sha for _, sha in copies])
    lists = f"{notes.keys.prefix}copies:".encode()
    scores = notes.store.commands([("ZSCORE", lists + sha, each) for each, sha in copies])
    for (sequence, _), holder, score in zip(copies, holders, scores, strict=True):
        if holder is None or holder >= sequence:
            notes.say(f"copy {sequence} has no original; its bytes lead to {holder}")
        if score != sequence:
            notes.say(f"copy {sequence} is not listed with its original")


def _check_names(notes: Notes, names: Named) -> Named:
    """Each id leads to its last sequence, and from there back to all it had before.

    Answers those that are not the last of their id, and the id's digest.
    """
    sequences = [sequence for sequence, _ in names]
    digests = [digest(name.decode(errors="replace")) for _, name in names]
    marks = [end(each) for each in digests]
    notes.ids[sequences] = marks
    latest = notes.look_up("id:", digests)
    lives = list(zip(sequences, marks, latest, strict=True))
    # Once an id, at the first of its lives: from each of thousands the way would be as long.
    heads = {
        (at, mark)
        for sequence, mark, at in lives
        if at not in (None, sequence)
        and not notes.followed(sequence, mark)
        and not notes.followed(at, mark)
    }
    _follow(notes, list(heads))
    for sequence, mark, at in lives:
        if at != sequence and not notes.followed(sequence, mark):
            notes.say(f"the id of sequence {sequence} does not lead back to it")
    return [
        (sequence, each)
        for sequence, each, at in zip(sequences, digests, latest, strict=True)
        if at is not None and at > sequence
    ]


def _follow(notes: Notes, ids: list[tuple[int, int]]) -> None:
    """Follow ids, each by its last sequence and its mark, back through all their lives."""
    while ids:
        for at, mark in ids:
            notes.follow(at, mark)
        fields = [notes.keys.record(at) for at, _ in ids]
        replies = notes.store.commands([("HGET", key, first + 3) for key, first in fields])
        # It must lead back: a later one would lead round in a circle.
        ids = [
            (back, mark)
            for (at, mark), reply in zip(ids, replies, strict=True)
            if (back := number(reply)) is not None and back < at
        ]
