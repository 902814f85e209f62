"""What a stored image costs Redis."""

from collections.abc import Iterator

import pytest

from deploy.local import LocalRedis
from tests.contract.harness import Bench, maintain, vectors, verdict
from worker.index import Index

IMAGES = 12_000
BATCH = 512
MOST = 370
"""Bytes an image on Valkey, everything included; 450 would still be good. 335 were measured,
and 381 on Redis 7; hashes that are not kept compact cost 70 to 80 more, chunks too large 50."""


@pytest.fixture
def server() -> Iterator[LocalRedis]:
    """An empty one: it keeps no log of what it is told, whose buffers would count."""
    with LocalRedis() as server:
        yield server


def fill(bench: Bench, index: Index) -> None:
    """Store images of ids of 24 characters, verdicts kept, with all upkeep."""
    settled = verdict(2**49)  # as many bytes as that of a picture that repeats none takes
    assert len(settled) == 14
    rows = vectors(IMAGES)
    arrivals = [bench.arrival(f"image-{at:018d}", row) for at, row in enumerate(rows)]
    for start in range(0, IMAGES, BATCH):
        part = arrivals[start : start + BATCH]
        answers = index.place(part)
        index.settle(
            [
                (bench.namespace, arrival.image_id, answer.sequence or 0, settled)
                for arrival, answer in zip(part, answers, strict=True)
            ]
        )
        maintain(index)


def test_an_image_takes_so_many_bytes_at_most(server: LocalRedis) -> None:
    bench = Bench(server.client, "default")
    client = server.client()
    index = bench.index(cluster_limit=256, first_cluster_limit=1024)
    index.open("default")
    before = int(client.info("memory")["used_memory"])
    fill(bench, index)
    taken = int(client.info("memory")["used_memory"]) - before
    assert taken / IMAGES <= MOST
    bench.assert_whole()
