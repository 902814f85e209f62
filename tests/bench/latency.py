"""Time from publishing an event to reading its verdict, at a given load.

Owns pacing: events leave at even distances, whether or not verdicts keep up, so that a slow answer
delays no later question (no coordinated omission). Both ends are clocked in this process.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import numpy as np
from confluent_kafka import Producer

from tests.bench.rig import PARTITIONS, Rig
from tests.stream.harness import Event

LEAST_EVENTS = 30  # of a second each, at the lowest load: fewer say nothing of the slowest
LOOK_SECONDS = 0.005  # between looks for verdicts, or looking would take part in the race
LATE_SECONDS = 60.0  # wait for the last verdicts
Make = Callable[..., Event]  # of an image id, a picture's bytes or uri, and a namespace
STAGES = ("recognise", "decode", "embed", "resolve", "publish")


@dataclass(frozen=True)
class Latency:
    """Event to verdict at one load."""

    events_per_second: float
    p50_seconds: float
    p99_seconds: float
    service_seconds: float  # mean time in all stages together, waiting between them left out


def stream(run: str, pictures: Sequence[bytes | str], make: Make, count: int) -> list[Event]:
    """So many events, made of pictures or their uris by `make`, each new in a namespace of `run`.

    Later rounds of the pictures are in other namespaces, or they would be exact copies, which are
    cheaper than what is to be measured.
    """
    return [
        make(f"image-{number}", picture, namespace=f"{run}-{number // len(pictures)}")
        for number, picture in enumerate(islice(cycle(pictures), count))
    ]


def measure(rig: Rig, events: Sequence[Event], rate: float) -> Latency:
    """Publish `rate` events a second."""
    count = len(events)
    before = _stage_times(rig)
    sent: dict[str, float] = {}
    publisher = threading.Thread(target=_publish, args=(rig, events, 1 / rate, sent))
    publisher.start()
    got = _collect(rig, count, count / rate + LATE_SECONDS)
    publisher.join()
    waits = np.array([got[key] - at for key, at in sent.items()])
    return Latency(
        events_per_second=rate,
        p50_seconds=float(np.quantile(waits, 0.5)),
        p99_seconds=float(np.quantile(waits, 0.99)),
        service_seconds=sum(
            (total - before[stage][0]) / max(1.0, times - before[stage][1])
            for stage, (total, times) in _stage_times(rig).items()
        ),
    )


def _publish(rig: Rig, events: Sequence[Event], distance: float, sent: dict[str, float]) -> None:
    producer = Producer({"bootstrap.servers": rig.kafka.bootstrap, "acks": "all", "linger.ms": 0})
    producer.list_topics(rig.topics.images)  # or the first event would wait for the metadata
    begun = time.monotonic()
    for number, event in enumerate(events):
        time.sleep(max(0.0, begun + number * distance - time.monotonic()))
        sent[event.key] = begun + number * distance
        producer.produce(
            rig.topics.images,
            event.value,
            event.key.encode(),
            number % PARTITIONS,
            headers=list(event.headers),
        )
    producer.flush()


def _collect(rig: Rig, count: int, patience: float) -> dict[str, float]:
    """When each image's verdict was read. Raises TimeoutError when some do not come."""
    got: dict[str, float] = {}
    deadline = time.monotonic() + patience
    while len(got) < count:
        keys = rig.outcomes.read(0.05)
        now = time.monotonic()
        time.sleep(LOOK_SECONDS)
        got |= dict.fromkeys(keys, now)
        if now > deadline:
            raise TimeoutError(f"{count - len(got)} of {count} verdicts did not come")
    return got


def _stage_times(rig: Rig) -> dict[str, tuple[float, float]]:
    """Seconds and number of times in each stage, over all workers."""
    name = "dedup_stage_seconds"
    return {
        stage: (
            sum(worker.metric(f"{name}_sum", stage=stage) for worker in rig.workers),
            sum(worker.metric(f"{name}_count", stage=stage) for worker in rig.workers),
        )
        for stage in STAGES
    }
