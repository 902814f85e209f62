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
from tests.stream.harness import PATIENT, Event, Reader, Worker, inline, publish, until
from worker.embedder import Embedder
from worker.vectors import DIMENSIONS, quantize, similarity

PAIRS = 1000
SPARE = 3  # candidates for each scene wanted: those too like an earlier one are left out
THRESHOLD, MARGIN = 0.97, 0.005
BATCH = 64  # scenes embedded at once
BURST = 50  # pairs published at once
SECONDS = 600
BROKEN = Path(__file__).with_name("broken_worker.py")


@pytest.fixture(scope="module")
def pairs() -> list[tuple[bytes, bytes]]:
    """Pairs of JPEGs: each pair is alike by the threshold, and no two scenes are."""
    embedder = Embedder.load("default", mode="fp32")
    chosen: list[tuple[bytes, bytes]] = []
    vectors = np.empty((0, DIMENSIONS), np.int8)
    for start in range(0, PAIRS * SPARE, BATCH):
        scenes = [scene(number) for number in range(start, start + BATCH)]
        pairs = [(jpeg(image), jpeg(near_copy(image))) for image in scenes]
        embedded = quantize(embedder.embed([data for pair in pairs for data in pair]))
        for number, pair in enumerate(pairs):
            both = embedded[2 * number : 2 * number + 2]
            alike = similarity(both[:1], both[1:])[0, 0] > THRESHOLD + MARGIN
            if alike and similarity(both, vectors).max(initial=-1) < THRESHOLD - MARGIN:
                chosen.append(pair)
                vectors = np.concatenate([vectors, both])
        if len(chosen) >= PAIRS:
            return chosen[:PAIRS]
    raise AssertionError(f"only {len(chosen)} scenes are different enough")


def burst_events(pairs: list[tuple[bytes, bytes]], burst: range) -> list[Event]:
    """The first of each pair for partition 0, the second for partition 1."""
    return [
        inline(f"{number}-{side}", pairs[number][partition], partition=partition)
        for number in burst
        for partition, side in enumerate("ab")
    ]


def uniques_per_pair(
    kafka: LocalKafka,
    topics: Topics,
    start_worker: StartWorker,
    pairs: list[tuple[bytes, bytes]],
    **settings: object,
) -> Counter[str]:
    wanted_of_all = {"probes": 0, "threshold": THRESHOLD, **PATIENT, **settings}
    workers = [start_worker(**wanted_of_all) for _ in range(2)]
    for worker in workers:
        worker.wait_ready()
    wait_for_two_owners(workers)
    with Reader(kafka.bootstrap, topics.verdicts, topics.dead_letters) as reader:
        # In bursts, each answered before the next, so that neither worker runs ahead: else the two
        # of a pair would not meet, and nothing would race.
        for start in range(0, len(pairs), BURST):
            burst = range(start, min(start + BURST, len(pairs)))
            publish(kafka.bootstrap, topics.images, burst_events(pairs, burst))
            wanted = 2 * burst.stop
            reader.wait(
                lambda wanted=wanted: len(reader.messages[topics.verdicts]) >= wanted,  # type: ignore[misc]
                SECONDS,
                "verdicts",
            )
        verdicts = reader.verdicts(topics.verdicts)
        assert not reader.messages[topics.dead_letters]
    assert len(verdicts) == 2 * len(pairs)
    served = [worker.metric("dedup_event_to_verdict_seconds_count") for worker in workers]
    assert served == [len(pairs)] * 2
    uniques = Counter({str(number): 0 for number in range(len(pairs))})
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

    until(split, SECONDS, "one partition each")


def test_of_each_pair_exactly_one_is_unique(
    kafka_server: LocalKafka,
    topics: Topics,
    start_worker: StartWorker,
    pairs: list[tuple[bytes, bytes]],
) -> None:
    uniques = uniques_per_pair(kafka_server, topics, start_worker, pairs)
    assert set(uniques.values()) == {1}


def test_a_store_that_reads_before_it_inserts_is_caught(
    kafka_server: LocalKafka,
    topics: Topics,
    start_worker: StartWorker,
    pairs: list[tuple[bytes, bytes]],
) -> None:
    """The same oracle on a worker whose index is broken on purpose: some pairs are twice unique."""
    uniques = uniques_per_pair(kafka_server, topics, start_worker, pairs, command=(str(BROKEN),))
    assert 2 in uniques.values()
