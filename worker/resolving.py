"""Jobs with vectors to jobs with outcomes: insert and compare, decide, store the verdict.

Owns the order *index written → verdict stored*; publishing and committing come after it,
elsewhere. Every call may be repeated: the index answers a repeated call as it did the first.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from worker import decide
from worker.errors import DedupError, EventError, InfrastructureError, Reason
from worker.index import Answer, Arrival, Index
from worker.jobs import Job, segments
from worker.messages import Verdict, VerdictKind, check_id, verdict_id
from worker.metrics import Metrics
from worker.retrying import Persistence

Told = TypeVar("Told", Answer, Answer | None)


class Resolver:
    """Turns answers of the index into outcomes."""

    def __init__(
        self,
        *,
        index: Index,
        persist: Persistence,
        metrics: Metrics,
        model_id: str,
        threshold: float,
        on_step: Callable[[str], None],
    ) -> None:
        self._index = index
        self._persist = persist
        self._metrics = metrics
        self._model_id = model_id
        self._threshold = threshold
        self._on_step = on_step

    def recognise(self, jobs: list[Job]) -> None:
        """Answer known ids and known bytes before anything is decoded."""
        for segment in segments(jobs):
            for job, answer in self._persist("recognise", _ask, self._index.recognise, segment):
                job.answer = answer
            self._on_step("recognised")

    def resolve(self, jobs: list[Job]) -> None:
        """Give every live job its outcome, in order."""
        for segment in segments(jobs):
            live = [job for job in segment if job.live]
            for job in live:
                if job.is_delete:
                    self._forget(job)
            self._place([job for job in live if job.vector is not None])
            self._conclude([job for job in live if job.answer is not None])

    def _forget(self, job: Job) -> None:
        event = job.event
        assert event is not None
        position, topic = (job.record.partition, job.record.offset), job.record.topic_id

        def forget() -> None:
            if not job.lease.lost:
                self._index.forget(event.namespace, event.image_id, position, topic)

        self._persist("forget", forget)
        self._on_step("forgotten")

    def _place(self, jobs: list[Job]) -> None:
        if not jobs:
            return
        for job, answer in self._persist("place", _ask, self._index.place, jobs):
            job.answer = answer
            self._observe(answer)
        self._on_step("placed")

    def _observe(self, answer: Answer) -> None:
        self._metrics.clusters_probed.observe(answer.clusters_probed)
        self._metrics.vectors_compared.observe(answer.vectors_compared)
        self._metrics.cluster_records.observe(answer.cluster_records)
        if answer.truncated:
            self._metrics.probes_truncated.inc()
        if answer.best is not None:
            self._metrics.best_similarity.observe(answer.best.similarity)

    def _conclude(self, jobs: list[Job]) -> None:
        """Decide, store the verdict (the first one stored stays), render what is stored."""
        packed: dict[int, bytes] = {}
        unsettled: list[tuple[int, tuple[str, str, int, bytes]]] = []
        for number, job in enumerate(jobs):
            event, answer = job.event, job.answer
            assert event is not None and answer is not None
            if answer.outcome == "conflict":
                detail = "this id is stored with other bytes; delete it to replace the image"
                job.outcome = EventError(Reason.ID_CONFLICT, detail)
                continue
            if answer.verdict is not None:
                self._metrics.redeliveries.inc()
                packed[number] = answer.verdict
                continue
            packed[number] = decide.pack(conclude(answer, self._threshold))
            if answer.sequence is not None:
                entry = (event.namespace, event.image_id, answer.sequence, packed[number])
                unsettled.append((number, entry))
        if unsettled:
            entries = [entry for _, entry in unsettled]
            settled = self._persist("settle", self._index.settle, entries)
            for (number, _), won in zip(unsettled, settled, strict=True):
                if won is None:
                    self._read_again(jobs[number])
                    del packed[number]
                else:
                    packed[number] = won
            self._on_step("settled")
        for number, stored in packed.items():
            jobs[number].outcome = verdict = self._render(jobs[number], stored)
            if verdict is None:
                self._read_again(jobs[number])

    def _read_again(self, job: Job) -> None:
        """Redis has lost what was placed: drop the job as one whose partition is another's."""
        if not job.lease.lost:
            self._index.replay_from((job.record.partition, job.record.offset))
            job.lease.lost = True

    def _render(self, job: Job, packed: bytes) -> Verdict | None:
        """The message; None where Redis has lost an image that it names.

        Raises DedupError where what Redis keeps is no verdict, and waits where it keeps a verdict
        and not what that names.
        """
        event, answer = job.event, job.answer
        assert event is not None and answer is not None
        named = (answer.exact_of, answer.earliest, answer.best, *answer.matches)
        names = {near.sequence: near.image_id for near in named if near is not None}
        try:
            decision = decide.unpack(packed)
        except ValueError as error:
            raise DedupError(
                f"the index is damaged: the verdict of {event.image_id!r} in namespace "
                f"{event.namespace!r} cannot be read ({error}); see `python -m worker fsck`"
            ) from error
        if missing := decision.sequences() - names.keys():
            found = self._persist("names", self._named, job, packed, missing)
            if found is None:
                return None
            names |= found
        identity = (
            check_id(event.namespace, event.image_id, job.record)
            if answer.sequence is None
            else verdict_id(event.namespace, event.image_id, answer.sequence)
        )
        return decide.render(decision, event, identity, names, self._model_id)

    def _named(self, job: Job, packed: bytes, named: set[int]) -> dict[int, str] | None:
        """The ids of images that a kept verdict names; None where Redis has lost them.

        It loses what was written last, and they came before the one the verdict is of. Where that
        is still there, reading it again would lead here again: raises InfrastructureError, but for
        a job that is not ours any more.
        """
        event, answer = job.event, job.answer
        assert event is not None and answer is not None
        assert answer.sequence is not None  # a check, which keeps nothing, is told all names
        if job.lease.lost:
            return None
        found = self._index.names(event.namespace, named)
        if not (gone := named - found.keys()):
            return found
        entry = (event.namespace, event.image_id, answer.sequence, packed)
        if self._index.settle([entry]) == [None]:
            return None
        raise InfrastructureError(
            f"the index is damaged: sequence {min(gone)} has no id, and the verdict of "
            f"{event.image_id!r} in namespace {event.namespace!r} names it; see "
            "`python -m worker fsck`"
        )


def _ask(ask: Callable[[list[Arrival]], Sequence[Told]], jobs: list[Job]) -> list[tuple[Job, Told]]:
    """What the index says to jobs that are still ours.

    Asked anew at each try: an image that its partition's next owner was told to forget must not
    be stored when Redis comes back.
    """
    ours = [job for job in jobs if not job.lease.lost]
    return list(zip(ours, ask([job.arrival() for job in ours]), strict=True))


def conclude(answer: Answer, threshold: float) -> decide.Decision:
    """The decision an answer of the index leads to."""
    original = answer.exact_of or answer.earliest
    best = answer.exact_of or answer.best
    matches = (answer.exact_of,) if answer.exact_of is not None else answer.matches
    kind = VerdictKind.UNIQUE
    if original is not None:
        kind = VerdictKind.EXACT if answer.exact_of is not None else VerdictKind.DUPLICATE
    return decide.Decision(
        kind=kind,
        threshold_micro=round(threshold * decide.MICRO),
        clusters_probed=answer.clusters_probed,
        vectors_compared=answer.vectors_compared,
        truncated=answer.truncated,
        duplicate_of=decide.near(original) if original is not None else None,
        best=decide.near(best) if best is not None else None,
        matches=tuple(decide.near(match) for match in matches),
    )
