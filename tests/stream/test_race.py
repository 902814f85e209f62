"""A thousand near-identical pairs arriving at once: exactly one of each pair is unique.

The two of a pair are at the same offset of two partitions that belong to two worker processes.
All clusters are probed, so that nothing but the race can fail.
"""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from deploy.local import LocalKafka
from tests.conftest import Topics
from tests.photos import jpeg, near_copy, scene
from tests.stream.conftest import StartWorker
from tests.stream.harness import Event, Reader, Worker, inline, publish, until
from worker.embedder import Embedder
from worker.vectors import quantize, similarity

PAIRS = 1000
SPARE = 3  # candidates for each scene wanted: those too like an earlier one are left out
SECONDS = 300
BROKEN = Path(__file__).with_name("broken_worker.py")


@pytest.fixture(scope="module")
def pairs() -> tuple[list[tuple[bytes, bytes]], float]:
    """Pairs of JPEGs, and a threshold that every pair reaches and no two scenes do."""
    embedder = Embedder.load("default", mode="fp32")
    candidates = [scene(number) for number in range(PAIRS * SPARE)]
    first = [jpeg(image) for image in candidates]
    second = [jpeg(near_copy(image)) for image in candidates]
    vectors = quantize(embedder.embed(first))
    copies = quantize(embedder.embed(second))
    own = np.array(
        [similarity(a[None], b[None])[0, 0] for a, b in zip(vectors, copies, strict=True)]
    )
    threshold = 0.97
    chosen: list[int] = []
    for number in np.flatnonzero(own > threshold + 0.005):
        both = np.stack([vectors[number], copies[number]])
        others = np.concatenate([vectors[chosen], copies[chosen]])
        if similarity(both, others).max(initial=-1) < threshold - 0.005:
            chosen.append(int(number))
        if len(chosen) == PAIRS:
            break
    assert len(chosen) == PAIRS, "too few different scenes for this threshold"
    return [(first[number], second[number]) for number in chosen], threshold


def uniques_per_pair(
    kafka: LocalKafka,
    topics: Topics,
    start_worker: StartWorker,
    pairs: tuple[list[tuple[bytes, bytes]], float],
    **settings: object,
) -> Counter[str]:
    images, threshold = pairs
    workers = [start_worker(probes=0, threshold=threshold, **settings) for _ in range(2)]
    for worker in workers:
        worker.wait_ready()
    events: list[Event] = []
    for number, (first, second) in enumerate(images):
        events.append(inline(f"{number}-a", first, partition=0))
        events.append(inline(f"{number}-b", second, partition=1))
    with Reader(kafka.bootstrap, topics.verdicts, topics.dead_letters) as reader:
        wait_for_two_owners(workers)
        publish(kafka.bootstrap, topics.images, events)
        wanted = 2 * len(images)
        reader.wait(lambda: len(reader.messages[topics.verdicts]) >= wanted, SECONDS, "verdicts")
        verdicts = reader.verdicts(topics.verdicts)
        assert not reader.messages[topics.dead_letters]
    assert len(verdicts) == wanted
    served = [worker.metric("dedup_event_to_verdict_seconds_count") for worker in workers]
    assert served == [len(images)] * 2
    uniques = Counter({str(number): 0 for number in range(len(images))})
    for verdict in verdicts:
        uniques[verdict["image_id"].split("-")[0]] += verdict["verdict"] == "unique"
    return uniques


def wait_for_two_owners(workers: list[Worker]) -> None:
    """Partitions 0 and 1 must belong to different workers for the race to be one."""

    def split() -> bool:
        held = []
        for worker in workers:
            moves = [line for line in worker.lines() if "held" in line]
            held.append({number for _, number in moves[-1]["held"]} if moves else set())
        return len(held[0] & {0, 1}) == 1 and len(held[1] & {0, 1}) == 1 and not held[0] & held[1]

    until(split, 60, "one partition each")


def test_of_each_pair_exactly_one_is_unique(
    kafka_server: LocalKafka,
    topics: Topics,
    start_worker: StartWorker,
    pairs: tuple[list[tuple[bytes, bytes]], float],
) -> None:
    uniques = uniques_per_pair(kafka_server, topics, start_worker, pairs)
    assert set(uniques.values()) == {1}


def test_a_store_that_reads_before_it_inserts_is_caught(
    kafka_server: LocalKafka,
    topics: Topics,
    start_worker: StartWorker,
    pairs: tuple[list[tuple[bytes, bytes]], float],
) -> None:
    """The same oracle on a worker whose index is broken on purpose: some pairs are twice unique."""
    uniques = uniques_per_pair(kafka_server, topics, start_worker, pairs, command=(str(BROKEN),))
    assert 2 in uniques.values()
