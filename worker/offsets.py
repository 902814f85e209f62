"""How far each partition is finished without a gap; only that may be committed.

Knows nothing of Kafka clients. Not thread-safe: its owner holds the lock.
"""

from collections import deque
from dataclasses import dataclass, field

Partition = tuple[str, int]


@dataclass
class _Progress:
    open: deque[int] = field(default_factory=deque)  # consumed, in order, head is unfinished
    finished: set[int] = field(default_factory=set)  # finished ahead of the head
    next_offset: int | None = None  # everything below is finished
    committed: int | None = None


class OffsetTracker:
    """Offsets consumed and finished, per partition."""

    def __init__(self) -> None:
        self._partitions: dict[Partition, _Progress] = {}

    def consumed(self, partition: Partition, offset: int) -> None:
        """Note that `offset` is in work. Offsets come in rising order, with gaps (compaction)."""
        self._partitions.setdefault(partition, _Progress()).open.append(offset)

    def finish(self, partition: Partition, offset: int) -> None:
        """Note that the outcome of `offset` is acknowledged; unknown partitions were given up."""
        progress = self._partitions.get(partition)
        if progress is None:
            return
        progress.finished.add(offset)
        while progress.open and progress.open[0] in progress.finished:
            head = progress.open.popleft()
            progress.finished.remove(head)
            progress.next_offset = head + 1

    def committable(self) -> dict[Partition, int]:
        """Next offset to read for each partition that has moved since its last commit."""
        return {
            partition: progress.next_offset
            for partition, progress in self._partitions.items()
            if progress.next_offset is not None and progress.next_offset != progress.committed
        }

    def finished(self, partition: Partition) -> int:
        """Everything below is finished; -1 where nothing is."""
        progress = self._partitions.get(partition)
        return -1 if progress is None or progress.next_offset is None else progress.next_offset

    def committed(self, offsets: dict[Partition, int]) -> None:
        """Note that Kafka has stored `offsets`."""
        for partition, offset in offsets.items():
            if partition in self._partitions:
                self._partitions[partition].committed = offset

    def unfinished(self, partitions: set[Partition] | None = None) -> int:
        """Events in work, of the given partitions or of all."""
        return sum(
            len(progress.open) - len(progress.finished)
            for partition, progress in self._partitions.items()
            if partitions is None or partition in partitions
        )

    def forget(self, partitions: set[Partition]) -> None:
        """Drop partitions that now belong to somebody else."""
        for partition in partitions:
            self._partitions.pop(partition, None)
