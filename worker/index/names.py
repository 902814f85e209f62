"""Which image has which sequence.

Owns a memory of the ids a worker stored or asked for last, and asking Redis for the others. A
sequence is one image's for ever, so what is remembered stays true. It must not know vectors.
"""

from collections import OrderedDict
from collections.abc import Mapping

from worker.index.keys import read_id
from worker.index.space import Space
from worker.index.store import PIPELINE, Store

NAMES = 32_768
"""Image ids kept in memory, of all namespaces: some 8 MB where they are short."""
CHARACTERS = 1 << 22
"""Characters they have together at most."""


class Names:
    """Image ids by sequence; used by one thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: OrderedDict[tuple[str, int], str] = OrderedDict()
        self._characters = 0

    def __len__(self) -> int:
        return len(self._known)

    def learn(self, space: Space, names: Mapping[int, str]) -> None:
        """Remember names; those longest unused are forgotten."""
        origin = space.keys.origin
        for sequence, name in names.items():
            if (origin, sequence) not in self._known:
                self._known[origin, sequence] = name
                self._characters += len(name)
        while len(self._known) > NAMES or self._characters > CHARACTERS:
            self._characters -= len(self._known.popitem(last=False)[1])

    def of(self, space: Space, wanted: set[int]) -> dict[int, str] | None:
        """Return the names of sequences, without those that are nobody's.

        None when the space does not hold any more.
        """
        origin, named = space.keys.origin, dict[int, str]()
        for sequence in wanted:
            if (name := self._known.get((origin, sequence))) is not None:
                named[sequence] = name
                self._known.move_to_end((origin, sequence))
        unknown = sorted(wanted - named.keys())
        parts = [unknown[at : at + PIPELINE] for at in range(0, len(unknown), PIPELINE)]
        replies = self._store.scripts("names", [(space.keys, part) for part in parts])
        asked: dict[int, str] = {}
        for part, names in zip(parts, replies, strict=True):
            if not names:
                return None
            for sequence, name in zip(part, names, strict=True):
                if name is not None:
                    asked[sequence] = read_id(name, sequence)
        self.learn(space, asked)
        return named | asked
