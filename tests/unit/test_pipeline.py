"""How many pictures are embedded at once, and how long the embedder waits for company."""

from dataclasses import replace
from functools import partial

import pytest

from worker.lanes import LULL, Lanes
from worker.pipeline import (
    BACKLOG,
    MANY,
    SOON,
    STOCK,
    PipelineSettings,
    embedded_together,
    embedding_patience,
)

SETTINGS = PipelineSettings(threshold=0.5, batch_images=64, batch_wait_seconds=0.02)


@pytest.mark.parametrize(
    ("coming", "fills", "embedding", "times"),
    [
        (SOON - 1, False, False, 0),  # alone each is as cheap
        (SOON - 1, False, True, 1),
        (SOON, False, False, 1),
        (STOCK - 1, False, True, 1),
        (STOCK, False, False, LULL),
        (1, True, False, 1),
        (63, True, True, 1),
        (64, True, False, LULL),
    ],
)
def test_more_are_waited_for_where_it_pays(
    coming: int, fills: bool, embedding: bool, times: int
) -> None:
    assert embedding_patience(coming, SETTINGS, fills, embedding) == 0.02 * times


def test_turns_are_longer_where_a_backlog_is_on_its_way() -> None:
    found = [embedded_together(n, SETTINGS, False) for n in (0, 1, BACKLOG - 1, BACKLOG, 10_000)]
    assert found == [SOON, SOON, SOON, MANY, MANY]
    assert embedded_together(1, SETTINGS, True) == embedded_together(1_000, SETTINGS, True) == 64
    small = replace(SETTINGS, batch_images=2)
    assert {embedded_together(n, small, False) for n in (1, BACKLOG)} == {2}


def test_what_is_held_up_is_not_waited_for() -> None:
    """Of 40 pictures behind one that takes long, those done are none that will soon come."""
    patience = partial(embedding_patience, settings=SETTINGS, fills=False, embedding=False)
    for done, seconds in ((True, 0.0), (False, 0.02 * LULL)):
        told: list[float] = []

        def tell(coming: int, told: list[float] = told) -> float:
            told.append(patience(coming))
            return 0.0

        queue: Lanes[tuple[int, bool]] = Lanes(lambda job: ("t", job[0]), lambda job: job[1])
        queue.put([(0, False), *[(0, done)] * 40, (1, True)])
        assert queue.take(SOON, tell) == [(1, True)]
        assert told == [seconds]
