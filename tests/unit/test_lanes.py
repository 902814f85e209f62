"""Order inside a partition, independence between partitions, and patience only where it pays."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, Queue
from threading import Event, Thread

import pytest

from worker.lanes import CROWDED, LULL, InLine, Lanes, Turns, gather, take_all
from worker.offsets import Partition


@dataclass
class Item:
    partition: Partition
    number: int
    ready: bool = True


def lanes() -> Lanes[Item]:
    return Lanes(lambda item: item.partition, lambda item: item.ready)


P, Q = ("t", 0), ("t", 1)


def long(here: int) -> float:
    """Patience no test waits for."""
    return 60.0


def short(here: int) -> float:
    """Patience that soon ends."""
    return 0.01


def test_a_slow_head_holds_back_its_own_partition_only() -> None:
    queue = lanes()
    slow = Item(P, 1, ready=False)
    queue.put([slow, Item(P, 2), Item(Q, 1)])
    assert [(i.partition, i.number) for i in queue.take(10)] == [(Q, 1)]
    slow.ready = True
    queue.wake()
    assert [i.number for i in queue.take(10)] == [1, 2]


def test_a_lone_item_does_not_wait_for_company() -> None:
    queue = lanes()
    queue.put([Item(P, 1)])
    assert len(queue.take(64, long)) == 1


def test_with_more_on_the_way_it_waits_for_them() -> None:
    queue = lanes()
    late = Item(Q, 2, ready=False)
    queue.put([Item(P, 1), late])
    with ThreadPoolExecutor(1) as pool:
        taking = pool.submit(queue.take, 64, long)
        late.ready = True
        queue.wake()
        assert sorted(i.number for i in taking.result(10)) == [1, 2]


def test_patience_ends() -> None:
    queue = lanes()
    queue.put([Item(P, 1), Item(Q, 2, ready=False)])
    assert [i.number for i in queue.take(64, short)] == [1]


def test_a_busy_partition_does_not_starve_the_others() -> None:
    queue = lanes()
    queue.put([Item(P, n) for n in range(100)])
    queue.put([Item(Q, n) for n in range(100)])
    first, second = queue.take(50), queue.take(50)
    assert {i.partition for i in first} != {i.partition for i in second}
    both = [*first, *second, *queue.take(200)]
    for partition in (P, Q):
        assert [i.number for i in both if i.partition == partition] == list(range(100))


def test_closing_ends_the_wait() -> None:
    queue = lanes()
    started = Event()
    with ThreadPoolExecutor(1) as pool:

        def take() -> list[Item]:
            started.set()
            return queue.take(1)

        taking = pool.submit(take)
        assert started.wait(10)
        queue.close()
        assert taking.result(10) == []


def clock(monkeypatch: pytest.MonkeyPatch, *times: float) -> Iterator[float]:
    """Let `take` read these times instead of the clock."""
    left = iter(times)
    monkeypatch.setattr("worker.lanes.monotonic", lambda: next(left))
    return left


def test_patience_depends_on_how_many_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those taken already are counted, and those that are not ready."""
    queue, told = lanes(), []
    queue.put([Item(P, 0), *(Item(Q, n, ready=False) for n in range(3))])

    def patience(here: int) -> float:
        told.append(here)
        return 0.01

    left = clock(monkeypatch, 0.0, 0.02)
    assert len(queue.take(4, patience)) == 1
    assert (told, list(left)) == ([4], [])


def test_whoever_is_behind_takes_all_that_is_queued() -> None:
    queue: Queue[list[Item]] = Queue()
    for number in range(3):
        queue.put([Item(P, number)])
    assert [item.number for item in take_all(queue)] == [0, 1, 2]
    with pytest.raises(Empty):
        take_all(queue, timeout=0.01)


def gathering(*batches: list[Item]) -> "Queue[list[Item]]":
    queue: Queue[list[Item]] = Queue()
    for batch in batches:
        queue.put(batch)
    return queue


def test_a_lone_job_is_gathered_at_once() -> None:
    alone = gathering([Item(P, 0)])
    assert len(gather(alone, 4, 4, patience=60.0, coming=lambda: 0)) == 1


def test_gathering_waits_for_what_is_coming_but_not_for_ever() -> None:
    queue = gathering([Item(P, 0)])
    coming = [1]

    def arrive() -> int:
        """The other one comes while it is waited for."""
        if coming.pop() if coming else 0:
            queue.put([Item(P, 1)])
            return 1
        return 0

    assert [item.number for item in gather(queue, 4, 4, 60.0, arrive)] == [0, 1]
    assert len(gather(gathering([Item(P, 2)]), 4, 4, 0.01, lambda: 1)) == 1


def test_gathering_ends_with_a_full_batch_or_an_empty_one() -> None:
    full = gathering([Item(P, 0)], [Item(P, 1)])
    assert len(gather(full, 2, 2, 60.0, lambda: 9)) == 2
    assert gather(gathering([]), 2, 2, 60.0, lambda: 9) == []


def test_enough_are_gathered_where_no_whole_batch_is_on_its_way() -> None:
    enough = gathering([Item(P, 0)], [Item(P, 1)])
    assert len(gather(enough, 2, 9, 60.0, lambda: 6)) == 2
    more = gathering([Item(P, 0), Item(P, 1)])

    def arrive() -> int:
        more.put([Item(P, 2)] * 7)
        return 7

    assert len(gather(more, 2, 9, 60.0, arrive)) == 9


class Asked(Queue[list[Item]]):
    """A queue that tells how long it was waited for."""

    timeouts: list[float]

    def get(self, block: bool = True, timeout: float | None = None) -> list[Item]:
        if timeout is not None:
            self.timeouts.append(timeout)
        return super().get(block, timeout)


def test_gathering_is_more_patient_where_a_whole_batch_is_on_its_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for others, waited in ((2, 0.01), (3, 0.01 * LULL)):
        queue = Asked()
        queue.timeouts = []
        queue.put([Item(P, 0)])
        clock(monkeypatch, 0.0, 0.0)
        gather(queue, 2, 4, 0.01, lambda others=others: others)  # type: ignore[misc]
        assert queue.timeouts == [waited]


def test_that_patience_has_an_end_however_many_come(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Asked()
    queue.timeouts = []
    queue.put([Item(P, 0)])
    spent = 0.01 * (CROWDED - 2)
    clock(monkeypatch, 0.0, 0.0, spent)

    def coming() -> int:
        if not queue.timeouts:
            queue.put([Item(P, 1)])
        return 9

    assert len(gather(queue, 2, 9, 0.01, coming)) == 2
    assert queue.timeouts == pytest.approx([0.01 * LULL, 0.01 * CROWDED - spent])


def test_what_is_taken_in_turn_is_handed_on_in_turn() -> None:
    turns: Turns[int] = Turns()
    numbers, handed = iter(range(3)), []
    finished = [Event() for _ in range(3)]

    def work() -> None:
        turn, number = turns.take(lambda: next(numbers))
        finished[number].wait()
        with turns.wait_for(turn):
            handed.append(number)

    threads = [Thread(target=work) for _ in finished]
    assert not turns.open
    for thread in threads:
        thread.start()
    for event in reversed(finished):  # the first is the last to finish its work
        assert not handed
        assert turns.open
        event.set()
        threads[0].join(0.1)
    for thread in threads:
        thread.join()
    assert handed == [0, 1, 2]
    assert not turns.open


def test_one_thread_takes_at_a_time() -> None:
    turns: Turns[str] = Turns()
    first, second = Event(), Event()

    def slowly() -> str:
        first.wait()
        return "first"

    def at_once() -> str:
        second.set()
        return "second"

    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(turns.take, slowly)
        fast = pool.submit(turns.take, at_once)
        assert not second.wait(0.1)
        first.set()
        assert [slow.result(), fast.result()] == [(0, "first"), (1, "second")]


def test_what_is_in_line_is_counted_by_name_and_nothing_is_kept_of_the_rest() -> None:
    line: InLine[str] = InLine()
    for name in ("a", "b", "a"):
        line.enter(name)
    line.leave("a")
    assert "a" in line and "b" in line and "c" not in line
    line.leave("a")
    line.leave("b")
    assert "a" not in line
    for number in range(1000):
        line.enter(str(number))
        line.leave(str(number))
    assert len(line) == 0
