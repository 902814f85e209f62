"""Offsets of one topic say nothing of another's: one made anew, another one, another Kafka's."""

import pytest

from tests.contract.harness import Bench, vectors
from worker.errors import ConfigError
from worker.index import Index
from worker.index.keys import FILES, PARTITIONS

OLD, NEW = "8d9f", "c01a"


def test_what_another_topic_says_is_younger_whatever_its_offsets(bench: Bench) -> None:
    index, rows = bench.index(), vectors(2)
    first = bench.arrival("x", rows[0], position=(0, 500), topic=OLD)
    other = bench.arrival("x", rows[1], bytes="others", position=(0, 5), topic=NEW)
    index.place([first])
    assert index.place([other])[0].outcome == "conflict"
    assert index.forget(bench.namespace, "x", (0, 6), NEW)
    assert index.place([bench.arrival("y", rows[0], position=(0, 7), topic=NEW)])[0].sequence == 2
    other = bench.arrival("x", rows[1], bytes="others", position=(0, 8), topic=NEW)
    assert index.place([other])[0].sequence == 3
    bench.assert_whole()


def test_within_a_topic_an_event_that_comes_again_is_the_same(bench: Bench) -> None:
    index, rows = bench.index(), vectors(1)
    for topic in (OLD, NEW):
        added = bench.arrival("x", rows[0], position=(0, 5), topic=topic)
        sequence = index.place([added])[0].sequence
        assert index.forget(bench.namespace, "x", (0, 6), topic)
        # Another worker, which asks for the numbers itself.
        again = bench.index()
        assert again.place([added])[0].sequence == sequence
        assert again.forget(bench.namespace, "x", (0, 6), topic)
        assert not again.forget(bench.namespace, "x", (0, 4), topic), "older than the add"
    assert bench.sequences() == 2


def test_a_topic_has_one_number_in_all_generations(bench: Bench) -> None:
    index, rows = bench.index(), vectors(1)
    index.place([bench.arrival("x", rows[0], topic=NEW)])
    building = Index(bench.connect(), "model-b", bench.settings, building=True)
    building.open(bench.namespace)
    spaces = [vars(each)["_spaces"][bench.namespace] for each in (building, index)]
    assert [space.partition(OLD, 3) for space in spaces] == [PARTITIONS + 3] * 2
    assert [space.partition(NEW, 3) for space in spaces] == [3] * 2
    assert [space.partition("", 3) for space in spaces] == [3] * 2, "brokers that tell no id"


def test_a_partition_that_cannot_be_told_apart_is_refused(bench: Bench) -> None:
    index = bench.index()
    added = bench.arrival("x", vectors(1)[0], position=(PARTITIONS, 0), topic=OLD)
    with pytest.raises(ConfigError, match="too much"):
        index.place([added])
    bench.store().command("HSET", bench.keys().root, "topics", FILES // PARTITIONS)
    with pytest.raises(ConfigError, match="too much"):
        index.forget(bench.namespace, "x", (0, 0), NEW)
    assert bench.sequences() == 0
