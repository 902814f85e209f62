"""Ids whose digests, which anybody can compute, were chosen to fall into one bucket."""

from collections.abc import Iterator
from itertools import count, islice

import pytest

from tests.contract.harness import Bench, vectors
from worker.index.keys import LOAD, digest

BUCKET = 127
"""Of 128: the bucket of these ids once there are so many, and until then that of others."""
EVIL = 4_100
"""More than one command of a script takes: some 8,000 arguments, two for each."""


def evil_ids() -> Iterator[str]:
    """Ids of one bucket."""
    names = (f"evil-{number}" for number in count())
    return (name for name in names if digest(name)[3] % 128 == BUCKET)


@pytest.mark.parametrize("salted", [True, False])
def test_nobody_is_stored_twice_however_many_ids_share_a_bucket(bench: Bench, salted: bool) -> None:
    """What layout 1 has no salt for goes on working; with a salt the ids share none."""
    index = bench.index(script_arrivals=512)
    index.place([bench.arrival("innocent", vectors(1)[0], bytes="same")])
    store, keys = bench.store(), bench.keys()
    if not salted:
        store.command("HSET", keys.root, f"layout:{keys.generation}", "1")
        store.command("HDEL", keys.meta, "salt")
    evil = [bench.arrival(name, bytes="same") for name in islice(evil_ids(), EVIL)]
    others = [bench.arrival(f"other-{at}", bytes="same") for at in range(BUCKET * LOAD - EVIL)]
    first = index.recognise(evil + others)
    sizes = store.commands([("HLEN", f"{keys.prefix}id:{at}") for at in range(BUCKET + 1)])
    assert max(sizes) > EVIL if not salted else max(sizes) < 128
    assert bench.index().recognise(evil + others) == first
    assert bench.sequences() == 1 + len(evil) + len(others)
    bench.assert_whole()


def test_every_namespace_has_a_salt_of_its_own(bench: Bench) -> None:
    other = Bench(bench.connect, bench.namespace + " other")
    salts = []
    for each in (bench, other):
        each.index().place(each.arrivals("p", vectors(100)))
        salts.append(each.store().command("HGET", each.keys().meta, "salt"))
        each.assert_whole()
    assert len(set(salts)) == 2 and all(len(salt) == 16 for salt in salts)
