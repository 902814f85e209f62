"""Events for fault tests: families of pictures, so that verdicts depend on what came before.

And lives of images that are deleted, asked for and stored again, each in one partition, so that
their order is given and no fault may change what is said of them.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.conftest import PARTITIONS
from tests.photos import jpeg, near_copy, scene
from tests.stream.harness import Event, by_uri, inline, tombstone

PER_FAMILY = 3
LIVES_FROM = 1_000_000  # scenes of theirs, which no family has
TIMES = ("2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z")  # of two lives of one id
LINKED = TemporaryDirectory(prefix="dedup-linked-")  # pictures that events name
THRESHOLD = 0.9
# Everything is probed, so that a replay by brute force must come to the same verdicts; small
# batches and frequent commits, so that faults hit between them.
SETTINGS: dict[str, object] = {
    "threshold": THRESHOLD,
    "probes": 0,
    "batch_images": 8,
    "commit_interval_seconds": 0.1,
    "in_flight_events": 32,
    "fetch_schemes": "file",
    "fetch_roots": LINKED.name,
}

Life = tuple[str, str | None]
"""An image id, and when what was stored under it occurred; one event's, if that is told."""


@dataclass
class Promised(Event):
    """An event whose verdict is known beforehand."""

    verdict: str = ""
    duplicate_of: str | None = None


def endless(at_once: int) -> Iterator[list[Event]]:
    """Ever new families and lives."""
    for first in count(0, at_once):
        yield mixed(at_once, first)


def mixed(number_of: int, first: int = 0) -> list[Event]:
    """So many families, and a life for every third of them, beside each other."""
    return families(number_of, first) + lives(-(-number_of // 3), first)


def families(number_of: int, first: int = 0) -> list[Event]:
    """Original, near copy and exact copy of each scene, spread over all partitions.

    The three arrive at the same time in three partitions: which is unique is for the run to
    decide, that exactly one is, is not.
    """
    events = []
    for number in range(first, first + number_of):
        original = scene(number)
        pictures = [jpeg(original), jpeg(near_copy(original), 80), jpeg(original)]
        events += [
            inline(f"{number}-{kind}", data, partition=(number + kind) % PARTITIONS)
            for kind, data in enumerate(pictures)
        ]
    return events


def lives(number_of: int, first: int = 0) -> list[Event]:
    """Stored, deleted, and stored again under the same id; and deleted for good, and asked for."""
    return [event for number in range(first, first + number_of) for event in _life(number)]


def _life(number: int) -> list[Event]:
    """Events of one partition that each have one answer only.

    A check that is redelivered sees what is stored by then, so nothing like it is stored or
    deleted after it.
    """
    back, gone = scene(LIVES_FROM + 2 * number), scene(LIVES_FROM + 2 * number + 1)
    again, lost = f"again-{number}", f"lost-{number}"
    events: list[Event] = [
        _promised(inline(again, jpeg(back), occurred_at=TIMES[0]), "unique"),
        _promised(_linked(lost, jpeg(gone)), "unique"),
        tombstone(again),
        _promised(inline(again, jpeg(near_copy(back)), occurred_at=TIMES[1]), "unique"),
        tombstone(lost),
        _promised(_linked(f"like-{number}", jpeg(back)), "duplicate", again),
        _promised(inline(f"asked-{number}", jpeg(gone, 80), op="check"), "unique"),
        _promised(inline(f"seen-{number}", jpeg(back, 80), op="check"), "duplicate", again),
    ]
    for event in events:
        event.partition = number % PARTITIONS
    return events


def _linked(image_id: str, data: bytes) -> Event:
    path = Path(LINKED.name) / f"{image_id}.jpg"
    path.write_bytes(data)
    return by_uri(image_id, path.as_uri())


def _promised(event: Event, verdict: str, duplicate_of: str | None = None) -> Promised:
    return Promised(**vars(event), verdict=verdict, duplicate_of=duplicate_of)


def picture(event: Event) -> bytes:
    """The bytes an event brings or names."""
    assert event.value is not None
    if not event.headers:
        return Path(json.loads(event.value)["uri"].removeprefix("file://")).read_bytes()
    return event.value


def is_check(event: Event) -> bool:
    """Whether it asks only."""
    return ("op", b"check") in event.headers


def life_of(event: Event) -> Life:
    """What its verdict names it by."""
    occurred_at = dict(event.headers).get("occurred_at")
    return event.key, occurred_at.decode() if occurred_at else None


def living(events: Iterable[Event]) -> dict[str, Event]:
    """By image id, the event that stored what no later one has deleted."""
    found: dict[str, Event] = {}
    for event in events:
        if event.value is None:
            found.pop(event.key, None)
        elif not is_check(event):
            found[event.key] = event
    return found
