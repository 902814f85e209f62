"""Only a finished prefix is committable, whatever order things finish in."""

import random

from hypothesis import given
from hypothesis import strategies as st

from worker.offsets import OffsetTracker

P, Q = ("t", 0), ("t", 1)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=50), st.randoms())
def test_committable_never_passes_unfinished_work(gaps: list[int], chance: random.Random) -> None:
    offsets = [sum(gaps[: n + 1]) for n in range(len(gaps))]  # rising, with holes
    tracker = OffsetTracker()
    for offset in offsets:
        tracker.consumed(P, offset)
    finished: set[int] = set()
    for offset in chance.sample(offsets, len(offsets)):
        tracker.finish(P, offset)
        finished.add(offset)
        prefix = [o for n, o in enumerate(offsets) if set(offsets[: n + 1]) <= finished]
        assert tracker.committable() == ({P: prefix[-1] + 1} if prefix else {})
        assert tracker.unfinished() == len(offsets) - len(finished)


def test_what_is_committed_is_not_committed_again() -> None:
    tracker = OffsetTracker()
    for offset in (5, 6):
        tracker.consumed(P, offset)
    tracker.finish(P, 5)
    tracker.committed(tracker.committable())
    assert tracker.committable() == {}
    tracker.finish(P, 6)
    assert tracker.committable() == {P: 7}


def test_a_partition_given_up_is_forgotten_alone() -> None:
    tracker = OffsetTracker()
    tracker.consumed(P, 1)
    tracker.consumed(Q, 1)
    tracker.forget({P})
    tracker.finish(P, 1)
    tracker.finish(Q, 1)
    assert tracker.committable() == {Q: 2}
    assert tracker.unfinished({P, Q}) == 0
