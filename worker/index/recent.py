"""The last writes of a worker, and which of them Redis has lost.

Redis answers before its replicas and its disk have a write, so a fail-over or a crash may lose the
last ones; who empties Redis or lets it evict keys loses more, and the namespace begins anew under
another generation. Owns remembering them, looking for them again on a server with another history
or in another generation, and the events that are to be read again therefore. It must not know how
events are read.
"""

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass

from worker.index.keys import DELETED
from worker.index.space import Space
from worker.index.store import Store

log = logging.getLogger(__name__)

Position = tuple[int, int]
"""Partition and offset of an event."""
ORIGINS = 65_536
"""Namespaces of which is known where their last write was answered: generation and history."""
UNCERTAIN = ""
"""Stands for an origin that is none: whatever it is now, writes are looked for in it."""


@dataclass(frozen=True, slots=True)
class Write:
    """An image stored under a sequence, or deleted, as told by the event at `position`."""

    namespace: str
    image_id: str
    sequence: int
    position: Position
    topic: str = ""
    deletes: bool = False


class Recent:
    """The last `limit` writes of this process; thread-safe."""

    def __init__(self, store: Store, limit: int) -> None:
        self._store = store
        self._writes: deque[Write] = deque(maxlen=limit)
        self._origins: OrderedDict[str, str] = OrderedDict()
        self._lost: dict[int, int] = {}
        self._lock = threading.Lock()
        self.changes = self.lost_images = 0

    def wrote(self, space: Space, writes: Iterable[Write]) -> None:
        """Remember writes that were answered on that server."""
        with self._lock:
            self._writes.extend(writes)
            known = self._origins.get(space.keys.namespace)
            # Another thread has found another one before these writes were known: look again.
            same = known is None or known == space.keys.origin
            self._note_origin(space.keys.namespace, space.keys.origin if same else UNCERTAIN)

    def confirm(self, space: Space) -> None:
        """Look for what was written, where that was in another history or generation.

        Raises InfrastructureError; then it is looked for again next time.
        """
        if self._origins.get(space.keys.namespace) == space.keys.origin:
            return
        with self._lock:
            known = self._origins.get(space.keys.namespace)
            if known is not None and known != space.keys.origin:
                self._look(space)
            self._note_origin(space.keys.namespace, space.keys.origin)

    def knows(self, namespace: str) -> bool:
        """Whether it was confirmed on some server: it was there."""
        return namespace in self._origins

    def replay_from(self, position: Position) -> None:
        """An event whose image is gone is to be read again."""
        with self._lock:
            self._add_lost(position)

    def lost(self) -> dict[int, int]:
        """By partition the first event to be read again."""
        with self._lock:
            return dict(self._lost)

    def replaying(self, first: dict[int, int]) -> None:
        """These are being read again."""
        with self._lock:
            for partition, offset in first.items():
                if self._lost.get(partition) == offset:
                    del self._lost[partition]

    def _note_origin(self, namespace: str, origin: str) -> None:
        self._origins[namespace] = origin
        self._origins.move_to_end(namespace)
        while len(self._origins) > ORIGINS:
            self._origins.popitem(last=False)

    def _add_lost(self, position: Position) -> None:
        partition, offset = position
        self._lost[partition] = min(offset, self._lost.get(partition, offset))

    def _look(self, space: Space) -> None:
        """Find out which writes of a namespace are gone, and forget those."""
        mine = [write for write in self._writes if write.namespace == space.keys.namespace]
        gone = self._gone(space, mine)
        images = sum(not write.deletes for write in gone)
        self.changes += 1
        self.lost_images += images
        if not gone:
            log.info(
                "Redis was restarted or replaced; it has all this worker wrote lately",
                extra={"namespace": space.keys.namespace, "remembered": len(mine)},
            )
            return
        # Nothing older is left that could prove where the loss begins.
        may_be_more = len(gone) == len(mine) and len(self._writes) == self._writes.maxlen
        # What a topic held that is another one by now cannot be read again.
        topic = self._writes[-1].topic if self._writes else ""
        for write in gone:
            if write.topic == topic:
                self._add_lost(write.position)
        lost = {id(write) for write in gone}
        self._writes = deque(
            (write for write in self._writes if id(write) not in lost), self._writes.maxlen
        )
        log.error(
            "Redis lost writes it had acknowledged; their events are read again",
            extra={
                "namespace": space.keys.namespace,
                "lost_images": images,
                "lost_deletes": len(gone) - images,
                "of_former_topics": sum(write.topic != topic for write in gone),
                "may_be_more": may_be_more,
                "from": dict(self._lost),
            },
        )

    def _gone(self, space: Space, writes: list[Write]) -> list[Write]:
        """Images that are not where they were stored, and those that are there and were deleted."""
        fields = [space.keys.record(write.sequence) for write in writes]
        names = self._store.commands([("HGET", key, first + 1) for key, first in fields])
        records = self._store.commands([("HGET", key, first) for key, first in fields])
        return [
            write
            for write, name, record in zip(writes, names, records, strict=True)
            if name != write.image_id.encode() or (write.deletes and record[0] != DELETED)
        ]
