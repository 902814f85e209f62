"""Hands for the contract tests: make images, insert them, look at what the index holds."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from prometheus_client import Counter

from worker.decide import MICRO, Decision, pack
from worker.index import Answer, Arrival, Index, IndexSettings
from worker.index.fsck import check
from worker.index.keys import Keys, State
from worker.index.store import Client, Store
from worker.jobs import Job, Lease
from worker.messages import ImageEvent, Op, Record, VerdictKind
from worker.metrics import Metrics
from worker.resolving import Resolver
from worker.retrying import Persistence
from worker.vectors import Vectors, quantize

# A thread that waits for another one's split waits longer than a busy machine can keep it.
SETTINGS = IndexSettings(
    threshold=0.8, cluster_limit=32, first_cluster_limit=1, probes=0, place_attempts=1_500
)
MODEL = "model-a"


def vectors(count: int, seed: int = 0) -> Vectors:
    """Random directions: no two of them are alike (similarity under 0.6)."""
    return quantize(np.random.default_rng(seed).normal(size=(count, 128)))


def near(rows: Vectors, seed: int = 0, noise: float = 0.2) -> Vectors:
    """A near-copy of each row, at similarity about 0.98."""
    rng = np.random.default_rng(seed)
    scale = rows.astype(float).std(axis=1, keepdims=True) * noise
    return quantize(rows + rng.normal(size=rows.shape) * scale)


def verdict(number: int = 0) -> bytes:
    """What is kept of a verdict `unique`, another one for each number."""
    return pack(Decision(VerdictKind.UNIQUE, MICRO // 2, 1, number, False, None, None, ()))


@dataclass
class Bench:
    """A namespace of its own on a real server."""

    connect: Callable[[], Client]
    namespace: str
    _offset: int = field(default=0)

    def index(self, model: str = MODEL, **changes: Any) -> Index:
        """A fresh worker's index with a connection of its own."""
        return Index(self.connect(), model, replace(SETTINGS, **changes))

    @property
    def settings(self) -> IndexSettings:
        """The settings every index has that asks for no others."""
        return SETTINGS

    def store(self) -> Store:
        """The commands below the index."""
        return Store(self.connect())

    def arrival(self, image_id: str, vector: Vectors | None = None, **changes: Any) -> Arrival:
        """An add event of an image whose bytes are its id's, at the next offset of partition 0."""
        self._offset += 1
        plain = Arrival(
            self.namespace,
            image_id,
            hashlib.sha256(str(changes.pop("bytes", image_id)).encode()).digest(),
            store=True,
            position=(0, self._offset),
            vector=vector,
        )
        return replace(plain, **changes)

    def arrivals(self, prefix: str, rows: Vectors) -> list[Arrival]:
        """One arrival a row, named prefix-0, prefix-1, ..."""
        return [self.arrival(f"{prefix}-{at}", row) for at, row in enumerate(rows)]

    def keys(self) -> Keys:
        """The keys of the generation that answers."""
        serving = self.store().command("HGET", Keys(self.namespace, "").root, "serving")
        return Keys(self.namespace, serving.decode())

    def sequences(self) -> int:
        """How many sequences were handed out."""
        return int(self.store().command("HGET", self.keys().meta, "sequence"))

    def lengths(self) -> int:
        """How many records all clusters hold, dead ones included."""
        states = self.store().command("HGETALL", self.keys().clusters).values()
        return sum(State.unpack(state).length for state in states)

    def assert_whole(self) -> None:
        """Every invariant holds."""
        assert check(self.store(), self.namespace) == []


def resolver(index: Index) -> tuple[Resolver, Persistence]:
    """What turns a worker's answers into outcomes, and how it waits where Redis is in trouble."""
    persist = Persistence("Redis", Counter("errors", "Errors", ["kind"], registry=None))
    made = Resolver(
        index=index,
        persist=persist,
        metrics=Metrics(),
        model_id=MODEL,
        threshold=SETTINGS.threshold,
        on_step=lambda step: None,
    )
    return made, persist


def job(arrival: Arrival) -> Job:
    """The event of an arrival on its way through the stages."""
    partition, offset = arrival.position
    return Job(
        Record("images", partition, offset, 0, arrival.image_id.encode(), b"x"),
        Lease(("images", partition)),
        event=ImageEvent(arrival.image_id, Op.ADD, arrival.namespace),
        sha256=arrival.sha256,
        vector=arrival.vector,
    )


def place_all(index: Index, arrivals: Sequence[Arrival], batch: int = 16) -> list[Answer]:
    """Place in batches, with all upkeep in between."""
    answers: list[Answer] = []
    for start in range(0, len(arrivals), batch):
        answers += index.place(arrivals[start : start + batch])
        maintain(index)
    return answers


def maintain(index: Index) -> None:
    """Do all upkeep there is."""
    while index.maintain():
        pass


def earliest_ids(answers: Sequence[Answer]) -> list[str | None]:
    """The id of each answer's earliest match."""
    return [answer.earliest.image_id if answer.earliest else None for answer in answers]
