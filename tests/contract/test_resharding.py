"""A slot of Redis Cluster moves to another node while images come, as `redis-cli` moves it."""

import threading
import time
from collections.abc import Callable

from deploy.local import HOST, LocalRedis
from tests.contract.harness import Bench, maintain, place_all, vectors
from tests.stream.harness import until
from worker.errors import InfrastructureError
from worker.index.keys import Keys
from worker.index.store import Store

IMAGES, BEFORE, AFTER = 2000, 400, 200
KEYS = 10  # moved at once
PAUSE_SECONDS = 0.02
SECONDS = 60.0


class Feeder:
    """Inserts images eight at a time, with all upkeep; what Redis refuses it tries again."""

    def __init__(self, bench: Bench) -> None:
        self._index, self._arrivals = bench.index(), bench.arrivals("p", vectors(IMAGES))
        self.placed, self.refused = 0, list[str]()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._feed, daemon=True)

    def __enter__(self) -> "Feeder":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def wait_for(self, images: int) -> None:
        """Wait until so many were placed."""
        until(lambda: self.placed >= images, SECONDS, f"{images} placed")

    def wait_for_refusal(self) -> None:
        """Wait until something was refused."""
        until(lambda: bool(self.refused), SECONDS, "something ran into the move")

    def _feed(self) -> None:
        while self.placed < IMAGES and not self._stop.is_set():
            try:
                self._index.place(self._arrivals[self.placed : self.placed + 8])
                self.placed += 8
                maintain(self._index)
            except InfrastructureError as error:
                self.refused.append(str(error))
                time.sleep(PAUSE_SECONDS)


def test_a_slot_that_moves_leaves_everything_whole(trio: LocalRedis) -> None:
    bench = Bench(trio.cluster_client, "moving")
    place_all(bench.index(), bench.arrivals("before", vectors(100, seed=1)))
    with Feeder(bench) as feeder:
        feeder.wait_for(BEFORE)
        move(trio, Keys("moving", "").root, feeder.wait_for_refusal)
        after = feeder.placed + AFTER
        feeder.wait_for(after)
    assert {each.split(":")[0] for each in feeder.refused} == {"Redis"}
    assert bench.sequences() == 100 + feeder.placed
    bench.assert_whole()


def move(trio: LocalRedis, key: str, begun: Callable[[], None]) -> None:
    """Move a key's slot to another node; `begun` is called before the first of its keys."""
    client = trio.cluster_client()
    slot = Store(client).command("CLUSTER", "KEYSLOT", key)
    port = client.get_node_from_key(key).port  # type: ignore[no-untyped-call]
    source = next(node for node in trio.nodes if node.port == port)
    target = next(node for node in trio.nodes if node.port != port)
    ids = {node.port: Store(node.client()).command("CLUSTER", "MYID") for node in trio.nodes}
    here, there = Store(source.client()), Store(target.client())
    there.command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[port])
    here.command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target.port])
    begun()
    while keys := here.command("CLUSTER", "GETKEYSINSLOT", slot, KEYS):
        here.command("MIGRATE", HOST, target.port, "", 0, 5000, "REPLACE", "KEYS", *keys)
        time.sleep(PAUSE_SECONDS)  # so that images come while a part of the keys has moved
    for node in (target, *trio.nodes):
        Store(node.client()).command("CLUSTER", "SETSLOT", slot, "NODE", ids[target.port])
