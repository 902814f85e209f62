"""Leases, what is in work, and what a rebalance drops."""

from concurrent.futures import ThreadPoolExecutor

from worker.assignment import Assignment
from worker.jobs import Job, segments
from worker.messages import ImageEvent, Op, Record
from worker.metrics import Metrics

P, Q = ("images", 0), ("images", 1)


def record(partition: int, offset: int) -> Record:
    return Record("images", partition, offset, 0, b"key", b"value" * 10)


def holding(*partitions: tuple[str, int]) -> Assignment:
    assignment = Assignment(Metrics())
    assignment.assigned(set(partitions))
    return assignment


def test_only_records_of_held_partitions_become_jobs() -> None:
    assignment = holding(P)
    jobs = assignment.admit([record(0, 1), record(1, 1), record(0, 2)])
    assert [(job.partition, job.record.offset) for job in jobs] == [(P, 1), (P, 2)]
    assert assignment.load()[:2] == (2, 2 * record(0, 1).size)


def test_finished_jobs_become_committable_in_order() -> None:
    assignment = holding(P)
    first, second = assignment.admit([record(0, 1), record(0, 2)])
    assignment.finish([second])
    assert assignment.committable() == {}
    assignment.finish([first])
    assert assignment.committable() == {P: 3}
    assignment.committed({P: 3})
    assert assignment.committable() == {}
    assert assignment.load()[:2] == (0, 0)


def test_who_waits_for_fewer_in_work_is_told_of_the_finished_and_of_the_dropped() -> None:
    assignment = holding(P, Q)
    finished, _, _ = assignment.admit([record(0, 1), record(0, 2), record(1, 1)])
    assert not assignment.wait_for_fewer(3, seconds=0.01)
    with ThreadPoolExecutor() as pool:
        waiting = [pool.submit(assignment.wait_for_fewer, than, 30.0) for than in (3, 2)]
        assignment.finish([finished])
        assert waiting[0].result()
        assert not waiting[1].done()
        assignment.released({Q})
        assert waiting[1].result()


def test_a_released_partition_takes_its_jobs_along() -> None:
    assignment = holding(P, Q)
    mine, theirs = assignment.admit([record(0, 1), record(1, 1)])
    assignment.released({Q})
    assert (mine.lease.lost, theirs.lease.lost) == (False, True)
    assert assignment.unfinished() == 1
    assignment.finish([theirs])  # a zombie's result changes nothing
    assert assignment.committable() == {}


def test_a_partition_that_comes_back_starts_afresh() -> None:
    assignment = holding(P)
    (old,) = assignment.admit([record(0, 1)])
    assignment.released({P})
    assignment.assigned({P})
    (new,) = assignment.admit([record(0, 1)])
    assignment.finish([old])
    assert assignment.committable() == {}
    assignment.finish([new])
    assert assignment.committable() == {P: 2}


def job(image_id: str | None, op: Op = Op.ADD) -> Job:
    (made,) = holding(P).admit([record(0, 1)])
    made.event = ImageEvent(image_id, op) if image_id else None
    return made


def test_segments_cut_at_repeated_ids_and_around_deletes() -> None:
    jobs = [job("a"), job("b"), job("a"), job(None), job("c"), job("a", Op.DELETE), job("a")]
    ids = [[j.event.image_id for j in part if j.event] for part in segments(jobs)]
    assert ids == [["a", "b"], ["a", "c"], ["a"], ["a"]]


def test_the_same_id_in_two_namespaces_is_no_repetition() -> None:
    first, second = job("a"), job("a")
    second.event = ImageEvent("a", Op.ADD, namespace="other")
    assert len(list(segments([first, second]))) == 1


def test_offsets_after_count_lost_jobs_too() -> None:
    """A verdict without its offset in the transaction could not be fenced."""
    assignment = holding(P, Q)
    jobs = assignment.admit([record(0, 1), record(0, 2), record(1, 7)])
    assignment.released({Q})
    assert assignment.offsets_after(jobs) == {P: 3, Q: 8}


def test_a_partition_read_again_drops_what_was_in_work_and_stays_ours() -> None:
    assignment = holding(P, Q)
    done, old, other = assignment.admit([record(0, 1), record(0, 2), record(1, 1)])
    assignment.finish([done])
    assignment.again({P: 1, ("images", 7): 1})  # the last one is another worker's
    assert (old.lease.lost, other.lease.lost) == (True, False)
    assert (assignment.committable(), assignment.unfinished()) == ({P: 1}, 1)
    (new,) = assignment.admit([record(0, 1)])
    assignment.finish([old, new])
    assert assignment.committable() == {P: 2}
