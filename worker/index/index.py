"""The index: recognise, place, settle, forget. Everything the pipeline may ask.

Owns the public calls and the repetition of what one round could not answer. It must not know Kafka,
verdict fields or where vectors come from.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from worker.errors import InfrastructureError
from worker.index.answers import Answer, Arrival, IndexSettings
from worker.index.auditing import Audit
from worker.index.keys import Keys, digest
from worker.index.placing import Placing, Reply, arguments, known
from worker.index.space import Space, Spaces, open_building, open_space, switch
from worker.index.splitting import Maintainer
from worker.index.store import Argument, Client, Store

NAMES = 65_536
"""Image ids kept in memory, by sequence."""
LONGEST_VERDICT = 64
PATIENCE = 4
"""Rounds tried at once; then another worker may be splitting, and each round waits a little."""

Round = Callable[[Space, list[Arrival]], list[Answer | bool | None]]


class Index:
    """One worker's view of all namespaces in Redis.

    Every call may be repeated with the same arguments: it changes nothing and answers the same.
    Failures of Redis raise InfrastructureError, another model's namespace ModelMismatch.
    `maintain` may run in another thread than the rest.
    """

    def __init__(
        self, client: Client, model_id: str, settings: IndexSettings, *, building: bool = False
    ) -> None:
        """`building` works on the generation this model is filling, not on the one that answers."""
        self._store = Store(client)
        self._settings = settings
        opener = open_building if building else open_space
        self._spaces = Spaces(self._store, model_id, settings.namespaces, opener)
        self._maintainer = Maintainer(self._store, settings)
        self._placing = Placing(self._store, settings, self._maintainer, self.names)
        self._names: OrderedDict[tuple[str, int], str] = OrderedDict()

    def open(self, namespace: str) -> None:
        """Open a namespace now, creating it when it is new; raises what any first use would."""
        self._spaces[namespace]

    def ping(self) -> None:
        """Raise InfrastructureError when Redis does not answer."""
        self._store.command("PING")

    def recognise(self, arrivals: Sequence[Arrival]) -> list[Answer | None]:
        """Answer what needs no vector: ids and bytes known before; None means new.

        An exact copy is recorded at once, under its own sequence.
        """
        return self._until_answered(arrivals, self._recognise_round)

    def place(self, arrivals: Sequence[Arrival]) -> list[Answer]:
        """Insert each arrival (its vector set) and answer with what was stored before it.

        Insert and read are one script, so of two alike arrivals exactly one sees the other.
        Raises ValueError when a vector is missing.
        """
        if any(arrival.vector is None for arrival in arrivals):
            raise ValueError("an arrival to place has no vector")
        answers = self._until_answered(arrivals, self._place_round)
        return [answer for answer in answers if answer is not None]

    def settle(self, verdicts: Sequence[tuple[str, str, int, bytes]]) -> list[bytes]:
        """Keep the verdict of each (namespace, image id, sequence, verdict of 1 to 64 bytes).

        The first one written stays; the answers are the verdicts kept. Raises ValueError for a
        verdict of another length and InfrastructureError when the sequence is not that image's.
        """
        calls: list[tuple[Keys, list[Argument]]] = []
        for namespace, image_id, sequence, verdict in verdicts:
            if not 0 < len(verdict) <= LONGEST_VERDICT:
                raise ValueError(f"a verdict takes 1 to {LONGEST_VERDICT} bytes: {len(verdict)}")
            calls.append((self._spaces[namespace].keys, [image_id, sequence, verdict]))
        kept: list[bytes] = self._store.scripts("settle", calls)
        for (namespace, _, sequence, _), verdict in zip(verdicts, kept, strict=True):
            if not verdict:
                self._spaces.forget(self._spaces[namespace])
                raise InfrastructureError(
                    f"sequence {sequence} is not stored as it was placed: data lost, or rebuilt"
                )
        return kept

    def names(self, namespace: str, sequences: Iterable[int]) -> dict[int, str]:
        """Return the image ids of sequences, deleted ones too; unknown sequences are left out."""
        keys = self._spaces[namespace].keys
        wanted = set(sequences)
        named = {each: name for each in wanted if (name := self._names.get((keys.prefix, each)))}
        unknown = sorted(wanted - named.keys())
        fields = [keys.record(sequence) for sequence in unknown]
        replies = self._store.commands([("HGET", key, first + 1) for key, first in fields])
        for sequence, name in zip(unknown, replies, strict=True):
            if name is not None:
                named[sequence] = self._names[keys.prefix, sequence] = name.decode()
        while len(self._names) > NAMES:
            self._names.popitem(last=False)
        return named

    def forget(self, namespace: str, image_id: str, position: tuple[int, int]) -> bool:
        """Delete an image as told by the event at `position` (partition, offset).

        True when it is gone because of this event, now or in an earlier delivery of it. An add
        older than the delete then gets its first verdict again; a later add is a new image.
        """
        for _ in range(self._settings.attempts):
            space = self._spaces[namespace]
            done = self._store.script("forget", space.keys, image_id, digest(image_id), *position)
            if done >= 0:
                return bool(done)
            self._spaces.forget(space)
        raise InfrastructureError(f"namespace {namespace!r} keeps changing its generation")

    def refresh(self) -> None:
        """Follow the centroid logs of all namespaces this worker has opened."""
        for space in self._spaces.opened():
            space.table.refresh()

    def maintain(self, namespace: str | None = None) -> bool:
        """Do one bounded piece of upkeep (split, merge, compact); False when nothing was done.

        Without a namespace, the first opened one with work is taken. Fenced: any number of
        workers may call it at once.
        """
        spaces = [self._spaces[namespace]] if namespace else self._spaces.opened()
        return any(self._maintainer.work(space) for space in spaces)

    def switch(self, namespace: str) -> None:
        """Let the generation built answer from now on, in one step; see `space.switch`."""
        switch(self._store, self._spaces[namespace])

    def audit(self, namespace: str, sample: int) -> Audit:
        """Begin an audit of `sample` images against brute force; `step` it to its end."""
        return Audit(self._store, self._spaces[namespace], self._settings, sample)

    def stats(self) -> dict[str, float]:
        """Numbers of this process for metrics: clusters known, cache bytes and entries, splits."""
        return {
            "clusters": float(sum(len(space.table) for space in self._spaces.opened())),
            "cache_bytes": float(self._placing.cache.size),
            "cached_clusters": float(len(self._placing.cache)),
            "splits": float(self._maintainer.splits),
        }

    def _until_answered(self, arrivals: Sequence[Arrival], ask: Round) -> list[Answer | None]:
        answers: list[Answer | None] = [None] * len(arrivals)
        for namespace, positions in _grouped(arrivals).items():
            waiting = positions
            for attempt in range(self._settings.attempts):
                if attempt >= PATIENCE:
                    time.sleep(min(0.001 * 2 ** (attempt - PATIENCE), 0.05))
                replies = ask(self._spaces[namespace], [arrivals[at] for at in waiting])
                for at, reply in zip(waiting, replies, strict=True):
                    if not isinstance(reply, bool):
                        answers[at] = reply
                waiting = [at for at, reply in zip(waiting, replies, strict=True) if reply is False]
                if not waiting:
                    break
            else:
                raise InfrastructureError(
                    f"{len(waiting)} arrivals of {namespace!r} still wait for clusters that move "
                    f"after {self._settings.attempts} rounds"
                )
        return answers

    def _recognise_round(self, space: Space, arrivals: list[Arrival]) -> list[Answer | bool | None]:
        calls = [(space.keys, arguments(arrival, self._settings)) for arrival in arrivals]
        replies = [Reply.of(raw) for raw in self._store.scripts("arrive", calls)]
        if any(reply.outcome == "stale" for reply in replies):
            self._spaces.forget(space)
        return [
            False if reply.outcome == "stale" else known(reply, arrival)
            for reply, arrival in zip(replies, arrivals, strict=True)
        ]

    def _place_round(self, space: Space, arrivals: list[Arrival]) -> list[Answer | bool | None]:
        answers, stale = self._placing.round(space, arrivals)
        if stale:
            self._spaces.forget(space)
        return answers


def _grouped(arrivals: Sequence[Arrival]) -> dict[str, list[int]]:
    """Positions of the arrivals of each namespace, in order."""
    groups: dict[str, list[int]] = {}
    for at, arrival in enumerate(arrivals):
        groups.setdefault(arrival.namespace, []).append(at)
    return groups
