"""What came out of the demo: verdicts and dead letters gathered, then judged by the truth.

Must not know how the servers and workers are run, nor how results are shown.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from kafka import KafkaConsumer, TopicPartition

from deploy.demo_photos import Kind, Sample

POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Outcome:
    """One event's end: a verdict, or a dead letter with its `reason`."""

    image_id: str
    seconds: float
    published_ms: int
    verdict: str = ""
    duplicate_of: str | None = None
    similarity: float | None = None
    best_match: str | None = None
    matches: Mapping[str, float] = field(default_factory=dict)
    threshold: float = 0.0
    reason: str = ""
    detail: str = ""


@dataclass(slots=True)
class Results:
    """Everything the output topics held, by image id, and how many events were published.

    Delivery is at least once: the same answer coming again is counted as `surplus`, no more.
    """

    events: int = 0
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    surplus: int = 0

    @property
    def complete(self) -> bool:
        """Whether every event has a verdict or a dead letter."""
        return self.events == len(self.outcomes)

    @property
    def missing(self) -> int:
        """How many events have neither."""
        return self.events - len(self.outcomes)

    @property
    def verdicts(self) -> Counter[str]:
        """How many verdicts there are of each kind."""
        return Counter(o.verdict for o in self.outcomes.values() if o.verdict)

    @property
    def dead_letters(self) -> Counter[str]:
        """How many dead letters there are for each reason."""
        return Counter(o.reason for o in self.outcomes.values() if o.reason)

    def rate(self) -> float:
        """Images a second between the first and the last outcome."""
        moments = sorted(o.published_ms for o in self.outcomes.values())
        if len(moments) < 2 or moments[0] == moments[-1]:
            return 0.0
        return 1000 * (len(moments) - 1) / (moments[-1] - moments[0])

    def latency(self, share: float) -> float:
        """The event-to-verdict time that `share` of the verdicts stay within, in seconds."""
        times = sorted(o.seconds for o in self.outcomes.values() if o.verdict)
        return times[min(len(times) - 1, int(share * len(times)))] if times else 0.0


class Collector:
    """Reads the two output topics from their beginning, as a consumer of its own."""

    def __init__(self, bootstrap: str, verdicts: str, dead_letters: str) -> None:
        self.results = Results()
        self._dead_letters = dead_letters
        self._consumer = KafkaConsumer(
            bootstrap_servers=bootstrap, auto_offset_reset="earliest", enable_auto_commit=False
        )
        outputs = [p for topic in (verdicts, dead_letters) for p in self._partitions(topic)]
        self._consumer.assign(outputs)

    def poll(self) -> list[Outcome]:
        """What came in since the last call; waits a fifth of a second for something to come."""
        polled = self._consumer.poll(timeout_ms=int(POLL_SECONDS * 1000))
        new = [
            _outcome(record, record.topic == self._dead_letters)
            for batch in polled.values()
            for record in batch
        ]
        for outcome in new:
            self.results.surplus += outcome.image_id in self.results.outcomes
            self.results.outcomes.setdefault(outcome.image_id, outcome)
        return new

    def close(self) -> None:
        """Disconnect."""
        self._consumer.close()

    def _partitions(self, topic: str) -> list[TopicPartition]:
        numbers = self._consumer.partitions_for_topic(topic) or ()
        return [TopicPartition(topic, number) for number in numbers]


def _outcome(record: Any, dead: bool) -> Outcome:
    if dead:
        headers = {name: value.decode(errors="replace") for name, value in record.headers}
        return Outcome(
            image_id=record.key.decode(),
            seconds=0.0,
            published_ms=record.timestamp,
            reason=headers["dedup-reason"],
            detail=headers["dedup-detail"],
        )
    verdict = json.loads(record.value)
    best = verdict["best_match"]
    matches = [*verdict["matches"], *([best] if best else [])]
    return Outcome(
        image_id=verdict["image_id"],
        seconds=record.timestamp / 1000
        - datetime.fromisoformat(verdict["occurred_at"]).timestamp(),
        published_ms=record.timestamp,
        verdict=verdict["verdict"],
        duplicate_of=verdict["duplicate_of"],
        similarity=verdict["similarity"],
        best_match=best and best["image_id"],
        matches={match["image_id"]: match["similarity"] for match in matches},
        threshold=verdict["threshold"],
    )


def judge(outcome: Outcome, truth: Mapping[str, Sample]) -> str:
    """ "" when the outcome is right by the known truth, else what is wrong with it."""
    sample = truth[outcome.image_id]
    if outcome.reason:
        return "" if sample.kind is Kind.BROKEN else f"dead letter: {outcome.reason}"
    if sample.kind is Kind.BROKEN:
        return f"a broken file was judged {outcome.verdict}"
    repeats = sample.kind not in (Kind.ORIGINAL, Kind.NEW)
    if outcome.duplicate_of is None:
        return "missed" if repeats else ""
    if not repeats or truth[outcome.duplicate_of].photo != sample.photo:
        return "taken for another photo"
    if (outcome.verdict == "exact") != (sample.kind is Kind.SAME_BYTES):
        return f"judged {outcome.verdict}"
    return ""
