"""A thousand near-identical pairs arriving at once: exactly one of each pair is unique.

The two of a pair are at the same offset of two partitions that belong to two worker processes.
All clusters are probed, so that nothing but the race can fail.
"""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from deploy.local import LocalKafka
from tests.conftest import PARTITIONS, Topics
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


def burst_events(
    pairs: list[tuple[bytes, bytes]], burst: range, partitions: list[int]
) -> list[Event]:
    """The first of each pair for one partition, the second for the other."""
    return [
        inline(f"{number}-{side}", data, partition=partition)
        for number in burst
        for side, data, partition in zip("ab", pairs[number], partitions, strict=True)
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
    partitions = one_of_each(workers)
    with Reader(kafka.bootstrap, topics.verdicts, topics.dead_letters) as reader:
        # In bursts, each answered before the next, so that neither worker runs ahead: else the two
        # of a pair would not meet, and nothing would race.
        for start in range(0, len(pairs), BURST):
            burst = range(start, min(start + BURST, len(pairs)))
            publish(kafka.bootstrap, topics.images, burst_events(pairs, burst, partitions))
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


def one_of_each(workers: list[Worker]) -> list[int]:
    """Partitions that belong to different workers, for the race to be one."""

    def held() -> list[set[int]]:
        moves = [[line for line in worker.lines() if "held" in line] for worker in workers]
        return [{number for _, number in each[-1]["held"]} if each else set() for each in moves]

    def split() -> bool:
        first, second = held()
        return len(first | second) == PARTITIONS and bool(first and second) and not first & second

    until(split, SECONDS, "some partitions each")
    return [min(each) for each in held()]


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
