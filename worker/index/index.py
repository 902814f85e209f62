"""The index: recognise, place, settle, forget. Everything the pipeline may ask.

Owns the public calls and the repetition of what one round could not answer. It must not know Kafka,
verdict fields or where vectors come from.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence

from worker.errors import ConfigError, InfrastructureError
from worker.index.answers import Answer, Arrival, IndexSettings
from worker.index.asking import STALE, Asked, ask, known, runs
from worker.index.auditing import Audit
from worker.index.keys import digest
from worker.index.missing import Missing
from worker.index.names import Names
from worker.index.placing import Placing
from worker.index.recent import Position, Recent, Write
from worker.index.space import (
    Building,
    Space,
    Spaces,
    exists,
    open_space,
    serving_keys,
    switch,
)
from worker.index.splitting import Maintainer
from worker.index.store import Client, Store

LONGEST_VERDICT = 256
"""Twenty matches among 2^48 images take 219 bytes."""
CHANGING = "{} keeps changing its generation or server"
PATIENCE = 4
"""Rounds tried at once; then another worker may be splitting, and each round waits a little."""
SHORTEST_PAUSE, LONGEST_PAUSE = 0.001, 0.05
"""Seconds."""

Round = Callable[[Space, list[Arrival]], list[Answer | bool | None]]


class Index:
    """One worker's view of all namespaces in Redis.

    Every call may be repeated with the same arguments: it changes nothing and answers the same.
    Failures of Redis raise InfrastructureError, another model's namespace ModelMismatch. Where it
    comes back without writes it had acknowledged, nothing read before is relied on any more, and
    `lost` tells which events are to be read again.
    `maintain` may run in another thread than the rest.
    """

    def __init__(
        self, client: Client, model_id: str, settings: IndexSettings, *, building: bool = False
    ) -> None:
        """`building` works on the generation this model is filling, not on the one that answers."""
        self._store = Store(client)
        self._settings = settings
        opener = Building() if building else open_space
        self._spaces = Spaces(self._store, model_id, settings.open_namespaces, opener)
        self._maintainer = Maintainer(self._store, settings)
        self._names = Names(self._store)
        self._placing = Placing(self._store, settings, self._maintainer, self._names)
        self._recent = Recent(self._store, settings.recent_writes)

    def open(self, namespace: str) -> None:
        """Open a namespace now, creating it when it is new; raises what any first use would."""
        self._space(namespace)

    def ping(self) -> None:
        """Raise InfrastructureError when Redis does not answer; notice when it is another one."""
        self._store.command("PING")
        spaces = self._spaces.opened()
        replies = self._store.scripts("served", [(space.keys, []) for space in spaces])
        for space, served in zip(spaces, replies, strict=True):
            if not served:
                self._spaces.forget(space)
                self._space(space.keys.namespace)

    def lost(self) -> dict[int, int]:
        """By partition, the offset of the first event whose write Redis has lost."""
        return self._recent.lost()

    def replaying(self, first: dict[int, int]) -> None:
        """Take note that events are read again from there: `lost` tells of them no more."""
        self._recent.replaying(first)

    def replay_from(self, position: Position) -> None:
        """Add an event to `lost`: `settle` said that its image is gone."""
        self._recent.replay_from(position)

    def recognise(self, arrivals: Sequence[Arrival]) -> list[Answer | None]:
        """Answer what needs no vector: ids and bytes known before; None means new.

        An exact copy is recorded at once, under its own sequence.
        """
        return self._until_answered(arrivals, self._recognise_round, absent=None)

    def place(self, arrivals: Sequence[Arrival]) -> list[Answer]:
        """Insert each arrival (its vector set) and answer with what was stored before it.

        Insert and read are one script, so of two alike arrivals exactly one sees the other.
        Raises ValueError when a vector is missing.
        """
        if any(arrival.vector is None for arrival in arrivals):
            raise ValueError("an arrival to place has no vector")
        answers = self._until_answered(arrivals, self._place_round, absent=Answer("placed"))
        return [answer for answer in answers if answer is not None]

    def settle(self, verdicts: Sequence[tuple[str, str, int, bytes]]) -> list[bytes | None]:
        """Keep the verdict of each (namespace, image id, sequence, verdict of 1 to 256 bytes).

        The first one written stays; the answers are the verdicts kept, None where Redis has lost
        that the sequence is the image's. Raises ValueError for a verdict of another length.
        """
        for *_, verdict in verdicts:
            if not 0 < len(verdict) <= LONGEST_VERDICT:
                raise ValueError(f"a verdict takes 1 to {LONGEST_VERDICT} bytes: {len(verdict)}")
        kept: list[bytes | None] = [None] * len(verdicts)
        for namespace, positions in _grouped([namespace for namespace, *_ in verdicts]).items():
            parts = _cut(positions, self._settings.script_arrivals)
            for _ in range(self._settings.place_attempts):
                space = self._space(namespace)
                calls = [
                    (space.keys, [each for at in part for each in verdicts[at][1:]])
                    for part in parts
                ]
                replies = self._store.scripts("settle", calls)
                if all(replies):
                    break
                self._spaces.forget(space)
            else:
                raise InfrastructureError(CHANGING.format(namespace))
            for part, reply in zip(parts, replies, strict=True):
                for at, verdict in zip(part, reply, strict=True):
                    kept[at] = verdict or None
        return kept

    def names(self, namespace: str, sequences: Iterable[int]) -> dict[int, str]:
        """Return the image ids of sequences, deleted ones too; unknown sequences are left out."""
        wanted = set(sequences)
        for _ in range(self._settings.place_attempts):
            space = self._space(namespace)
            named = self._names.of(space, wanted)
            if named is not None:
                return named
            self._spaces.forget(space)
        raise InfrastructureError(CHANGING.format(namespace))

    def forget(
        self, namespace: str, image_id: str, position: tuple[int, int], topic: str = ""
    ) -> bool:
        """Delete an image as told by the event at `position` (partition, offset) of a topic.

        True when it is gone because of this event, now or in an earlier delivery of it. An add
        older than the delete then gets its first verdict again; a later add is a new image.
        """
        for _ in range(self._settings.place_attempts):
            space = self._existing(namespace)
            if space is None:
                return False
            partition, offset = space.partition(topic, position[0]), position[1]
            deleted = self._store.script(
                "forget", space.keys, image_id, digest(image_id), partition, offset
            )
            if deleted >= 0:
                if deleted:
                    write = Write(namespace, image_id, deleted, position, topic, deletes=True)
                    self._recent.wrote(space, [write])
                return bool(deleted)
            self._spaces.forget(space)
        raise InfrastructureError(CHANGING.format(namespace))

    def refresh(self) -> None:
        """Follow the centroid logs of all namespaces this worker has opened."""
        for space in self._spaces.opened():
            space.table.refresh()

    def maintain(self, namespace: str | None = None) -> bool:
        """Do one bounded piece of upkeep (split, merge, compact); False when nothing was done.

        Without a namespace, the first opened one with work is taken. Fenced: any number of
        workers may call it at once. One in trouble holds up no other: its InfrastructureError is
        raised where nothing was done elsewhere.
        """
        spaces = [self._space(namespace)] if namespace else self._spaces.opened()
        troubles = []
        for space in spaces:
            try:
                if self._maintainer.work(space):
                    return True
            except InfrastructureError as error:
                troubles.append(error)
        if troubles:
            raise troubles[0]
        return False

    def missing(self, namespace: str) -> Missing:
        """Begin to compare what answers now with the generation built: what that one lacks."""
        built = self._space(namespace).keys
        return Missing(self._store, serving_keys(self._store, namespace), built)

    def switch(self, namespace: str) -> None:
        """Let the generation built answer from now on, in one step; see `space.switch`.

        Raises ConfigError, too, when Redis has lost some of what was stored in it.
        """
        built = self._space(namespace)  # a ping may open another one in its place, begun anew
        self.ping()
        if self.lost():
            raise ConfigError("Redis has lost some of what was stored: run the rebuild again")
        switch(self._store, built)

    def namespaces(self) -> list[str]:
        """Return the namespaces that are open now."""
        return [space.keys.namespace for space in self._spaces.opened()]

    def audit(self, namespace: str, sample: int) -> Audit:
        """Begin an audit of `sample` images against brute force; `step` it to its end."""
        return Audit(self._store, self._space(namespace), self._settings, sample)

    def stats(self) -> dict[str, float]:
        """Numbers of this process for metrics: clusters known, cache bytes and entries, splits."""
        return {
            "clusters": float(sum(len(space.table) for space in self._spaces.opened())),
            "cache_bytes": float(self._placing.cache.size),
            "cached_clusters": float(len(self._placing.cache)),
            "splits": float(self._maintainer.splits),
            "server_changes": float(self._recent.changes),
            "lost_images": float(self._recent.lost_images),
        }

    def _space(self, namespace: str) -> Space:
        """Return a namespace; its last writes are looked for where its server is another one."""
        space = self._spaces[namespace]
        self._recent.confirm(space)
        return space

    def _existing(self, namespace: str) -> Space | None:
        """Return a namespace for what stores nothing; None where there is none.

        One that this worker knew is opened as ever: only so it is noticed that Redis has lost it.
        """
        if self._recent.knows(namespace) or exists(self._store, namespace):
            return self._space(namespace)
        return None

    def _until_answered(
        self, arrivals: Sequence[Arrival], ask: Round, absent: Answer | None
    ) -> list[Answer | None]:
        """Ask round after round; a check is told `absent` in a namespace that there is not."""
        answers: list[Answer | None] = [None] * len(arrivals)
        for namespace, positions in _grouped(arrival.namespace for arrival in arrivals).items():
            waiting, attempt = positions, 0
            while waiting:
                if attempt >= PATIENCE:
                    time.sleep(pause_before(attempt))
                asked = [arrivals[at] for at in waiting]
                storing = any(arrival.store for arrival in asked)
                space = self._space(namespace) if storing else self._existing(namespace)
                replies: list[Answer | bool | None] = [absent] * len(asked)
                if space is not None:
                    replies = ask(space, asked)
                    self._remember(space, asked, replies)
                for at, reply in zip(waiting, replies, strict=True):
                    if not isinstance(reply, bool):
                        answers[at] = reply
                left = [at for at, reply in zip(waiting, replies, strict=True) if reply is False]
                attempt = attempt + 1 if len(left) == len(waiting) else 0
                waiting = left
                if attempt == self._settings.place_attempts:
                    raise InfrastructureError(
                        f"{len(waiting)} arrivals of {namespace!r} still wait for clusters that "
                        f"move after {attempt} rounds in which none was answered; if that goes on, "
                        "see `python -m worker fsck`"
                    )
        return answers

    def _remember(
        self, space: Space, arrivals: list[Arrival], replies: list[Answer | bool | None]
    ) -> None:
        writes = [
            Write(
                arrival.namespace,
                arrival.image_id,
                reply.sequence,
                arrival.position,
                arrival.topic,
            )
            for arrival, reply in zip(arrivals, replies, strict=True)
            if isinstance(reply, Answer)
            and reply.outcome in ("placed", "exact")
            and reply.sequence is not None
        ]
        if writes:
            self._recent.wrote(space, writes)

    def _recognise_round(self, space: Space, arrivals: list[Arrival]) -> list[Answer | bool | None]:
        parts = list(runs([Asked(each) for each in arrivals], self._settings.script_arrivals))
        told = ask(self._store, space, self._settings, parts, {}, version=space.table.version)
        replies = [reply for each in told for reply in each.replies]
        if any(reply.outcome == STALE for reply in replies):
            self._spaces.forget(space)
        return [
            False if reply.outcome == STALE else known(reply, arrival)
            for reply, arrival in zip(replies, arrivals, strict=True)
        ]

    def _place_round(self, space: Space, arrivals: list[Arrival]) -> list[Answer | bool | None]:
        answers, stale = self._placing.round(space, arrivals)
        if stale:
            self._spaces.forget(space)
        return answers


def pause_before(attempt: int) -> float:
    """Seconds to wait before a round, twice as many each time, up to the longest."""
    doublings = min(attempt - PATIENCE, 10)  # a float has no place for thousands of them
    return min(math.ldexp(SHORTEST_PAUSE, doublings), LONGEST_PAUSE)


def _grouped(namespaces: Iterable[str]) -> dict[str, list[int]]:
    """Positions of each namespace, in order."""
    groups: dict[str, list[int]] = {}
    for at, namespace in enumerate(namespaces):
        groups.setdefault(namespace, []).append(at)
    return groups


def _cut(items: list[int], size: int) -> list[list[int]]:
    return [items[at : at + size] for at in range(0, len(items), size)]
