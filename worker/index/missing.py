"""Which living images of one generation another one lacks: what a switch would forget.

Owns the comparison, by id and bytes, page by page; it reads only. It must not know events, nor why
something is missing.
"""

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

    def stored(self) -> int:
        """Return the last sequence `old` has handed out."""
        return self._sequence(self._old)

    def look(self, upto: int) -> None:
        """Compare the images up to a sequence that were not compared before."""
        if self._old.prefix == self._new.prefix:
            return  # it answers already, and workers write to it
        for first in range(self._seen // SPAN, upto // SPAN + 1, PAGE):
            self._compare(
                {
                    name: image
                    for name, (sequence, image) in self._living(first).items()
                    if self._seen < sequence <= upto
                }
            )
        self._seen = max(self._seen, upto)

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
        for name, there in self._look_up(list(images)).items():
            if there is None or not _stands_for(there, images[name]):
                self.count += 1
                if len(self.some) < NAMED:
                    self.some.append(name.decode())

    def _look_up(self, names: list[bytes]) -> dict[bytes, Image | None]:
        """What `new` has under each id."""
        new, last = self._new, self._sequence(self._new)
        salt = self._store.command("HGET", new.meta, "salt")
        digests = [digest(name.decode()) for name in names]
        replies = self._store.commands(
            [("HGET", new.lookup("id:", d, last, salt), d) for d in digests]
        )
        found = {n: int(reply) for n, reply in zip(names, replies, strict=True) if reply}
        places = [new.record(sequence) for sequence in found.values()]
        records = self._store.commands([("HGET", key, first) for key, first in places])
        images = {n: Image.unpack(raw) for n, raw in zip(found, records, strict=True) if raw}
        return {name: images.get(name) for name in names}


def _stands_for(there: Image, image: Image) -> bool:
    """Whether an image is kept, or was replaced or deleted by an event younger than it."""
    same_partition = there.news[0] == image.added[0]
    if same_partition and there.news[1] > image.added[1]:
        return True  # what answers now has not come to that event yet
    return there.living and there.sha == image.sha
