"""Events for fault tests: families of pictures, so that verdicts depend on what came before."""

from collections.abc import Iterator
from itertools import count

from tests.conftest import PARTITIONS
from tests.photos import jpeg, near_copy, scene
from tests.stream.harness import Event, inline

PER_FAMILY = 3
THRESHOLD = 0.9
# Everything is probed, so that a replay by brute force must come to the same verdicts; small
# batches and frequent commits, so that faults hit between them.
SETTINGS: dict[str, object] = {
    "threshold": THRESHOLD,
    "probes": 0,
    "batch_images": 8,
    "commit_interval_seconds": 0.1,
    "in_flight_events": 32,
}


def endless(at_once: int) -> Iterator[list[Event]]:
    """Ever new families."""
    for first in count(0, at_once):
        yield families(at_once, first)


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
