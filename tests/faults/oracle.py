"""What must hold whatever happened: the one oracle of all fault tests.

1. Each offset of the input has one distinct verdict, or one dead letter; with exactly-once, one
   message each.
2. Every verdict is what a replay finds that takes the stored vectors one by one in the order of
   their sequences, by brute force.
3. Of images that are alike, never two are unique.
4. `fsck` finds nothing.
5. A committed offset has only answered events below it, at every look and at the end.
6. What was deleted is not stored, and where an answer is known beforehand (`workload.Promised`),
   it is that one each time it is given: nothing is found that was deleted before.
7. Images of one partition are stored in its order, but for exact copies, unless Redis lost some.

Owns the reading of topics, group offsets and the index; it must not know which fault was injected.
What is like a deleted image must be promised: rule 2 knows only what is stored in the end.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from signal import SIGKILL
from time import monotonic
from typing import Any, NamedTuple

import numpy as np
from kafka import KafkaAdminClient
from kafka.errors import KafkaError

from deploy.local import LocalRedis
from tests.conftest import Topics
from tests.faults.workload import (
    Life,
    Promised,
    endless,
    is_check,
    life_of,
    living,
    picture,
)
from tests.stream.harness import Event, Reader, Worker, distinct, publish, until
from worker.index.cache import LAYOUT
from worker.index.fsck import check
from worker.index.keys import DELETED, NEVER_READ, Keys
from worker.index.store import Store
from worker.vectors import Vectors, similarity

NAMESPACE = "default"
MICRO = 1_000_000
# How long after its offset was committed an outcome may be seen: as long as it takes to be read, or
# as an open transaction of a dead worker hides it.
READ_SECONDS, HIDDEN_SECONDS = 60.0, 120.0
FED_AT_ONCE = 30
ANYTHING_SECONDS = 10.0  # in which everything there is has been read
Place = tuple[int, int]
"""Partition and offset of an event."""


class Stored(NamedTuple):
    """An image of the index; an exact copy has no vector."""

    sequence: int
    image_id: str
    vector: Vectors | None


class Oracle:
    """Publishes a workload, follows what comes of it, and judges."""

    def __init__(
        self,
        bootstrap: str,
        topics: Topics,
        redis: LocalRedis,
        *,
        delivery: str = "at-least-once",
        losing: bool = False,
    ) -> None:
        """`losing`: Redis loses writes; of an image the last verdict counts, not how many."""
        self.sent: dict[Place, Event] = {}
        self._bootstrap = bootstrap
        self._topics = topics
        self._redis = redis
        self._exactly_once = delivery == "exactly-once"
        self._losing = losing
        self._reader = Reader(
            bootstrap,
            topics.verdicts,
            topics.dead_letters,
            isolation=isolation(delivery),
        )

    def __enter__(self) -> "Oracle":
        return self

    def __exit__(self, *error: object) -> None:
        self._reader.__exit__()

    def publish(self, events: Iterable[Event]) -> list[Place]:
        """Send, and remember what must be answered; returns where the events are."""
        events = list(events)
        places = publish(self._bootstrap, self._topics.images, events)
        self.sent.update(zip(places, events, strict=True))
        return places

    @property
    def wanted(self) -> int:
        """Events sent so far that must have an outcome: all but deletes."""
        return sum(event.value is not None for event in self.sent.values())

    @property
    def outcomes(self) -> int:
        """Verdicts and dead letters seen so far."""
        return sum(len(messages) for messages in self._reader.messages.values())

    def verdicts(self) -> list[dict[str, Any]]:
        """The verdicts seen so far."""
        return self._reader.verdicts(self._topics.verdicts)

    def committed(self) -> dict[int, int]:
        """The group's offset of each partition that has one."""
        with KafkaAdminClient(bootstrap_servers=self._bootstrap) as admin:
            found = admin.list_group_offsets({self._topics.group: None})[self._topics.group]
        return {partition.partition: place.offset for partition, place in found.items()}

    def look(self) -> bool:
        """Rule 5 now; True when everything sent is committed."""
        committed = self.committed()
        passed = {(p, o) for p, o in self.sent if o < committed.get(p, 0)}
        patience = HIDDEN_SECONDS if self._exactly_once else READ_SECONDS
        try:
            until(lambda: self._read() >= passed, patience, "outcomes below the offsets")
        except AssertionError as error:
            raise AssertionError(f"{error}; {self._tell(passed - self._read())}") from None
        ends = {partition: offset + 1 for partition, offset in sorted(self.sent)}
        return all(committed.get(partition) == end for partition, end in ends.items())

    def _tell(self, missing: set[Place]) -> str:
        """Which events have no outcome, and how many a reader that begins now has of each."""
        counts = {kind: self._read_anew(kind) for kind in ("read_committed", "read_uncommitted")}
        lives = {place: life_of(self.sent[place]) for place in sorted(missing)}
        return ", ".join(
            f"{place} {life}: { {kind: count[life] for kind, count in counts.items()} }"
            for place, life in lives.items()
        )

    def _read_anew(self, isolation: str) -> "Counter[Life]":
        with Reader(self._bootstrap, self._topics.verdicts, isolation=isolation) as reader:
            deadline = monotonic() + ANYTHING_SECONDS
            while monotonic() < deadline:
                reader.read()
            return Counter(map(told_of, reader.verdicts(self._topics.verdicts)))

    def wait_for(self, outcomes: int, seconds: float) -> None:
        """Wait for so many outcomes in all, repeated ones too, looking at every step."""
        until(
            lambda: self._looks_done() or self.outcomes >= outcomes,
            seconds,
            f"{outcomes} outcomes",
        )

    def wait_for_answers(self, places: Collection[Place], count: int, seconds: float) -> None:
        """Wait until so many of these events are answered, looking at every step."""
        until(
            lambda: self._looks_done() or len(self._read() & set(places)) >= count,
            seconds,
            f"{count} of {len(places)} events answered",
        )

    def wait_until_finished(self, seconds: float) -> None:
        """Wait until everything is answered and committed, looking at every step."""
        until(self._looks_done, seconds, "everything answered and committed")

    def feed_until_dead(self, workers: list[Worker], seconds: float) -> None:
        """Publish as much as it takes until all of `workers` have died of their faults."""
        more = endless(FED_AT_ONCE)
        self.publish(next(more))

        def dead() -> bool:
            if self._looks_done():  # by one that has not come to its step often enough
                self.publish(next(more))
            return not any(worker.running for worker in workers)

        until(dead, seconds, "all dead")
        ends = [worker.process.returncode for worker in workers if worker.process is not None]
        assert ends == [-SIGKILL] * len(workers), "died of something else"

    def judge(self) -> dict[str, dict[str, Any]]:
        """All rules at the end; the verdicts of what is stored by image id."""
        assert self.look(), "offsets do not reach the end"
        verdicts = self.verdicts()
        said = latest(verdicts)
        self._judge_outcomes()
        self._judge_promises(said.values() if self._losing else verdicts)
        lives = {life_of(event) for event in living(self.sent.values()).values()}
        found = {life[0]: verdict for life, verdict in said.items() if life in lives}
        stored = self._stored()
        self._judge_replay(stored, found)
        self._judge_uniques(stored, found)
        if not self._losing:
            self._judge_order(stored)
        assert check(self._store(), NAMESPACE) == []
        return found

    def stored_ids(self) -> set[str]:
        """The images in the index now."""
        return {image.image_id for image in self._stored()}

    def _looks_done(self) -> bool:
        try:
            return self.look()
        except KafkaError:  # the broker is down for a while: that is a fault, too
            return False

    def _dead(self) -> list[Place]:
        letters = [dict(m.headers) for m in self._reader.messages[self._topics.dead_letters]]
        return [(int(each["dedup-partition"]), int(each["dedup-offset"])) for each in letters]

    def _read(self) -> set[Place]:
        """What is answered by now."""
        self._reader.read()
        answered = {told_of(verdict) for verdict in self.verdicts()}
        dead = set(self._dead())
        return {
            place
            for place, event in self.sent.items()
            if event.value is None or life_of(event) in answered or place in dead
        }

    def _judge_outcomes(self) -> None:
        """Rule 1."""
        dead, verdicts = Counter(self._dead()), self.verdicts()
        assert dead.keys() <= self.sent.keys()
        asked = [event for place, event in self.sent.items() if place not in dead]
        wanted = Counter(life_of(event) for event in asked if event.value is not None)
        found = Counter(map(told_of, verdicts))
        assert found.keys() == wanted.keys()
        ids = {told_of(verdict): verdict["verdict_id"] for verdict in verdicts}
        assert len(set(ids.values())) == len(ids), "two images share a verdict id"
        if not self._losing:
            checks = {life_of(event) for event in asked if is_check(event)}
            distinct((v for v in verdicts if told_of(v) not in checks), told_of)
            if self._exactly_once:
                assert (found - wanted, wanted - found) == (Counter(), Counter())
                assert set(dead.values()) <= {1}

    def _judge_promises(self, verdicts: Iterable[dict[str, Any]]) -> None:
        """Rule 6, but for what is stored."""
        promised = {life_of(e): e for e in self.sent.values() if isinstance(e, Promised)}
        for verdict in verdicts:
            if event := promised.get(told_of(verdict)):
                answer = verdict["verdict"], verdict["duplicate_of"]
                assert answer == (event.verdict, event.duplicate_of), verdict["image_id"]

    def _judge_replay(self, stored: list[Stored], found: dict[str, dict[str, Any]]) -> None:
        """Rule 2, and of rule 6 what is stored."""
        events = living(self.sent.values())
        deleted = any(event.value is None for event in self.sent.values())
        assert {image.image_id for image in stored} == found.keys()
        first: dict[str, str] = {}
        earlier: list[Stored] = []
        for image in stored:
            sha = hashlib.sha256(picture(events[image.image_id])).hexdigest()
            verdict = found[image.image_id]
            expected = (
                {"verdict": "exact", "duplicate_of": first[sha]}
                if sha in first
                else _compared(image, earlier, verdict["threshold"])
            )
            if deleted:
                expected.pop("best_match", None)  # it may have been the nearest
            assert {name: verdict[name] for name in expected} == expected, image.image_id
            first.setdefault(sha, image.image_id)
            if image.vector is not None:
                earlier.append(image)

    def _judge_uniques(self, stored: list[Stored], found: dict[str, dict[str, Any]]) -> None:
        """Rule 3."""
        alike = defaultdict(set)
        unique = [each for each in stored if found[each.image_id]["verdict"] == "unique"]
        vectors = np.array([each.vector for each in unique], np.int8)
        likeness = similarity(vectors, vectors)
        for row, image in enumerate(unique):
            near = np.flatnonzero(likeness[row] >= found[image.image_id]["threshold"])
            alike[image.image_id] = {unique[at].image_id for at in near} - {image.image_id}
        assert not any(alike.values()), f"alike and both unique: {dict(alike)}"

    def _judge_order(self, stored: list[Stored]) -> None:
        """Rule 7."""
        places: dict[str, Place] = {}
        for place, event in sorted(self.sent.items(), key=lambda sent: sent[0]):
            if event.value is None:
                places.pop(event.key, None)
            elif not is_check(event):
                places.setdefault(event.key, place)
        found: dict[int, list[int]] = defaultdict(list)
        for image in stored:
            if image.vector is None:  # an exact copy may be recognised before others are embedded
                continue
            partition, offset = places[image.image_id]
            found[partition].append(offset)
        for partition, offsets in found.items():
            assert offsets == sorted(offsets), f"partition {partition} out of order: {offsets}"

    def _store(self) -> Store:
        redis = self._redis
        return Store(redis.cluster_client() if redis.clustered else redis.client())

    def _stored(self) -> list[Stored]:
        """Everything in the index, in the order of the sequences."""
        store = self._store()
        generation = store.command("HGET", Keys(NAMESPACE, "").root, "serving").decode()
        keys = Keys(NAMESPACE, generation)
        vectors: dict[int, Vectors] = {}
        for cluster in store.command("HKEYS", keys.clusters):
            _, _, packed = store.script("read", keys, cluster, NEVER_READ)
            records = np.frombuffer(packed, LAYOUT)
            vectors |= zip(records["sequence"].tolist(), records["vector"], strict=True)
        last = int(store.command("HGET", keys.meta, "sequence") or 0)
        fields = [keys.record(sequence) for sequence in range(1, last + 1)]
        images = store.commands([("HGET", key, at) for key, at in fields])
        names = store.commands([("HGET", key, at + 1) for key, at in fields])
        return [
            Stored(sequence, name.decode(), vectors.get(sequence))
            for sequence, (image, name) in enumerate(zip(images, names, strict=True), start=1)
            if image[0] != DELETED
        ]


def isolation(delivery: str) -> str:
    """How outcomes are to be read to see what was promised."""
    return "read_committed" if delivery == "exactly-once" else "read_uncommitted"


def told_of(verdict: dict[str, Any]) -> Life:
    """What a verdict is about."""
    return verdict["image_id"], verdict["occurred_at"]


def latest(verdicts: list[dict[str, Any]]) -> dict[Life, dict[str, Any]]:
    """The last verdict of each: all of one image are in one partition, in their order."""
    return {told_of(verdict): verdict for verdict in verdicts}


def _compared(image: Stored, earlier: list[Stored], threshold: float) -> dict[str, Any]:
    """What a verdict must say of an image with new bytes."""
    assert image.vector is not None, f"{image.image_id} has new bytes and no vector"
    if not earlier:
        return {"verdict": "unique", "duplicate_of": None, "best_match": None}
    vectors = np.array([each.vector for each in earlier], np.int8)
    likeness = similarity(image.vector[np.newaxis], vectors)[0]
    alike = np.flatnonzero(likeness >= threshold)
    if not len(alike):
        return {"verdict": "unique", "duplicate_of": None}
    return {
        "verdict": "duplicate",
        "duplicate_of": earlier[alike[0]].image_id,
        "similarity": round(float(likeness[alike[0]]) * MICRO) / MICRO,
    }
