"""Which living images of one generation another one lacks: what a switch would forget.

Owns the comparison, by id and bytes, page by page; it reads only. It must not know events, nor why
something is missing.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from worker.index.keys import DELETED, IMAGE, REMOVAL, SPAN, Keys, digest
from worker.index.store import Store

PAGE = 128
"""Buckets read at once: up to 4,096 images, some MB."""
NAMED = 10
"""Ids told of those that are missing."""


@dataclass(frozen=True)
class Image:
    """An image's record as far as it is compared; `news` is its last event, `added` its first."""

    living: bool
    sha: bytes
    added: tuple[int, int]
    news: tuple[int, int]

    @classmethod
    def unpack(cls, packed: bytes) -> "Image":
        """Read a record as `keys` describes it."""
        kind, sha, partition, high, low, _, _ = IMAGE.unpack_from(packed)
        news = added = (partition, high << 32 | low)
        if kind == DELETED:
            partition, high, low = REMOVAL.unpack_from(packed, IMAGE.size)
            news = (partition, high << 32 | low)
        return cls(kind != DELETED, sha, added, news)


class Missing:
    """What the generation `new` lacks of `old`: a count, and the first few ids."""

    def __init__(self, store: Store, old: Keys, new: Keys) -> None:
        self._store, self._old, self._new = store, old, new
        self._seen = 0
        self.count = 0
        self.some: list[str] = []

    @property
    def same(self) -> bool:
        """Whether `new` is `old`: it answers already, and workers write to it."""
        return self._old.prefix == self._new.prefix

    def stored(self) -> int:
        """Return the last sequence `old` has handed out."""
        return self._sequence(self._old)

    def look(self, upto: int) -> None:
        """Compare the images up to a sequence that were not compared before.

        After InfrastructureError it may be called again, and goes on where it was.
        """
        if self.same:
            return
        for first in range((self._seen + 1) // SPAN, upto // SPAN + 1, PAGE):
            self._compare(
                {
                    name: image
                    for name, (sequence, image) in self._living(first).items()
                    if self._seen < sequence <= upto
                }
            )
            self._seen = max(self._seen, min(upto, (first + PAGE) * SPAN - 1))

    def _sequence(self, keys: Keys) -> int:
        return int(self._store.command("HGET", keys.meta, "sequence") or 0)

    def _living(self, first: int) -> dict[bytes, tuple[int, Image]]:
        """Sequence and record of the living images in a page of buckets, by id."""
        buckets = range(first, first + PAGE)
        replies = self._store.commands(
            [("HGETALL", self._old.record(bucket * SPAN)[0]) for bucket in buckets]
        )
        found = {}
        for bucket, fields in zip(buckets, replies, strict=True):
            for offset in range(SPAN):
                packed, name = (fields.get(b"%d" % (4 * offset + which)) for which in (0, 1))
                if packed and name and (image := Image.unpack(packed)).living:
                    found[name] = (bucket * SPAN + offset, image)
        return found

    def _compare(self, images: dict[bytes, Image]) -> None:
        places = self._look_up(list(images))
        latest = self._read(places)
        lacking = [
            name
            for name, image in images.items()
            if name not in latest
            or not (_stands_for(latest[name], image) or self._has_ended(places[name], image))
        ]
        self.count += len(lacking)
        self.some += [name.decode() for name in lacking[: NAMED - len(self.some)]]

    def _look_up(self, names: list[bytes]) -> dict[bytes, int]:
        """The last sequence `new` has of each id it knows.

        Workers may insert meanwhile, and lookups grow: where an id's bucket is another one after
        it was read, its entry may have moved there unseen.
        """
        found: dict[bytes, int] = {}
        waiting = self._buckets(names)
        while waiting:
            asked = [("HGET", key, digest(name.decode())) for name, key in waiting.items()]
            replies = zip(waiting, self._store.commands(asked), strict=True)
            found |= {name: int(reply) for name, reply in replies if reply}
            now = self._buckets([name for name in waiting if name not in found])
            waiting = {name: key for name, key in now.items() if key != waiting[name]}
        return found

    def _buckets(self, names: list[bytes]) -> dict[bytes, str]:
        """The key under which `new` would have each id now."""
        new, last = self._new, self._sequence(self._new)
        salt = self._store.command("HGET", new.meta, "salt")
        return {name: new.lookup("id:", digest(name.decode()), last, salt) for name in names}

    def _read(self, places: dict[bytes, int]) -> dict[bytes, Image]:
        """What `new` has at some sequences."""
        asked = [self._new.record(sequence) for sequence in places.values()]
        records = self._store.commands([("HGET", key, first) for key, first in asked])
        return {n: Image.unpack(raw) for n, raw in zip(places, records, strict=True) if raw}

    def _has_ended(self, sequence: int, image: Image) -> bool:
        """Whether `new` had the image, too, and a younger event deleted it before another came.

        That another is there does not tell: `old` may have refused that one for this image's sake.
        """
        lives = self._lives(sequence)
        return any(life.sha == image.sha and _is_younger(life, image) for life in lives)

    def _lives(self, sequence: int) -> Iterator[Image]:
        """What `new` has of an id, from this life back."""
        while sequence:
            key, first = self._new.record(sequence)
            packed, earlier = self._store.command("HMGET", key, first, first + 3)
            if packed:
                yield Image.unpack(packed)
            sequence = int(earlier or 0)


def _stands_for(there: Image, image: Image) -> bool:
    """Whether it is the image, or an event has deleted it that `old` may not have come to yet."""
    return there.sha == image.sha if there.living else _is_younger(there, image)


def _is_younger(life: Image, image: Image) -> bool:
    """Whether the life's last event came after the one an image was added by."""
    return life.news[0] == image.added[0] and life.news[1] > image.added[1]
