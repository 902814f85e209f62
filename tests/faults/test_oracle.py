"""The oracle itself: it passes a clean run, and no tampered one."""

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from deploy.local import LocalKafka, LocalRedis
from tests.conftest import Topics
from tests.faults import oracle as module
from tests.faults.oracle import NAMESPACE, Oracle, Place
from tests.faults.workload import SETTINGS, TIMES, mixed
from tests.stream.conftest import StartWorker
from tests.stream.harness import Event, tombstone
from worker.index.keys import Keys
from worker.index.store import Store

SECONDS = 600
FAMILIES = 5
Verdicts = list[dict[str, Any]]


def first(verdicts: Verdicts, kind: str) -> dict[str, Any]:
    return next(verdict for verdict in verdicts if verdict["verdict"] == kind)


def lost(verdicts: Verdicts) -> None:
    verdicts.pop()


def twice(verdicts: Verdicts) -> None:
    verdicts.append(verdicts[0])


def changed_its_mind(verdicts: Verdicts) -> None:
    verdicts.append({**verdicts[0], "verdict_id": "another"})


def two_uniques(verdicts: Verdicts) -> None:
    first(verdicts, "duplicate").update(verdict="unique", duplicate_of=None)


def wrong_original(verdicts: Verdicts) -> None:
    other = verdicts[0]["image_id"]
    found = first(verdicts, "duplicate")
    found["duplicate_of"] = other if found["duplicate_of"] != other else "nobody"


def wrong_similarity(verdicts: Verdicts) -> None:
    # Not of a check: what that found depends on what was stored just then, so no replay tells.
    stored = [verdict for verdict in verdicts if not verdict["image_id"].startswith("seen")]
    first(stored, "duplicate")["similarity"] -= 0.000_001


def an_exact_copy_compared(verdicts: Verdicts) -> None:
    first(verdicts, "exact")["verdict"] = "duplicate"


def never_sent(verdicts: Verdicts) -> None:
    verdicts.append({**verdicts[0], "image_id": "stranger", "verdict_id": "stranger's"})


def found_what_was_deleted(verdicts: Verdicts) -> None:
    found = next(verdict for verdict in verdicts if verdict["image_id"].startswith("asked"))
    found.update(verdict="duplicate", duplicate_of=found["image_id"].replace("asked", "lost"))


def knows_one_life_only(verdicts: Verdicts) -> None:
    second = next(verdict for verdict in verdicts if verdict["occurred_at"] == TIMES[1])
    second["occurred_at"] = TIMES[0]


def keys(redis: LocalRedis) -> Keys:
    generation = Store(redis.client()).command("HGET", Keys(NAMESPACE, "").root, "serving")
    return Keys(NAMESPACE, generation.decode())


def one_before_another(sent: dict[Place, Event]) -> dict[Place, Event]:
    """Two pictures of one partition, neither of them an exact copy, each in the other's place."""
    places = {event.key: place for place, event in sent.items()}
    one, another = places["3-1"], places["like-0"]
    assert one[0] == another[0]
    return {one: sent[another], another: sent[one]}


TAMPERINGS: list[Callable[[Verdicts], None]] = [
    lost,
    twice,
    changed_its_mind,
    two_uniques,
    wrong_original,
    wrong_similarity,
    an_exact_copy_compared,
    never_sent,
    found_what_was_deleted,
    knows_one_life_only,
]


def test_a_clean_run_passes_and_no_tampered_one(
    kafka_server: LocalKafka,
    redis_server: LocalRedis,
    topics: Topics,
    start_worker: StartWorker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start_worker(**SETTINGS)
    with Oracle(kafka_server.bootstrap, topics, redis_server, delivery="exactly-once") as oracle:
        oracle.publish(mixed(FAMILIES))
        oracle.wait_until_finished(SECONDS)
        oracle.judge()
        monkeypatch.setattr(module, "HIDDEN_SECONDS", 1.0)
        monkeypatch.setattr(module, "ANYTHING_SECONDS", 0.1)
        messages = oracle._reader.messages
        clean, untouched = oracle.verdicts(), messages[topics.verdicts]
        passed = []
        for tamper in TAMPERINGS:
            verdicts: Verdicts = json.loads(json.dumps(clean))
            tamper(verdicts)
            messages[topics.verdicts] = [
                SimpleNamespace(value=json.dumps(verdict)) for verdict in verdicts
            ]
            try:
                oracle.judge()
            except AssertionError:
                continue
            passed.append(tamper.__name__)
        assert passed == []
        messages[topics.verdicts] = untouched
        partition, offset = next(iter(oracle.sent))
        place = [("dedup-partition", b"%d" % partition), ("dedup-offset", b"%d" % offset)]
        messages[topics.dead_letters] = [SimpleNamespace(headers=place)]
        with pytest.raises(AssertionError):  # what has a verdict is a dead letter, too
            oracle.judge()
        messages[topics.dead_letters] = []
        oracle.judge()
        last = oracle.sent.popitem()
        oracle.sent[last[0]] = tombstone("0-0")
        with pytest.raises(AssertionError):  # what was deleted is stored
            oracle.judge()
        oracle.sent.update([last])
        oracle.judge()
        swapped = one_before_another(oracle.sent)
        oracle.sent.update(swapped)
        with pytest.raises(AssertionError, match="out of order"):
            oracle.judge()
        oracle.sent.update(zip(swapped, reversed(swapped.values()), strict=True))
        oracle.judge()
        redis_server.client().set(keys(redis_server).chunk(1, 1), b"x")
        with pytest.raises(AssertionError):  # a key that is nobody's
            oracle.judge()
