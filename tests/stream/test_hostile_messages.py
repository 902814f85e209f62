"""Messages made to hurt, all in one stream: each costs itself at most.

What each is refused for in detail is in `tests/unit/test_messages.py`.
"""

import json
from itertools import zip_longest

from deploy.local import LocalKafka, LocalRedis
from tests.conftest import Topics
from tests.faults.oracle import NAMESPACE
from tests.photos import jpeg, scene
from tests.stream.conftest import StartWorker
from tests.stream.harness import (
    PATIENT,
    Event,
    Reader,
    by_uri,
    inline,
    publish,
    tombstone,
    until,
)
from worker.header_names import RawName
from worker.index.fsck import check
from worker.index.store import Store
from worker.inflating import Bounds, bound

SECONDS = 300
DEEP = 100_000
MANY = 100_000
MOST = 1 << 30
BODY = {"schema": 1, "image_id": "x", "uri": "https://example.com/x.jpg"}
ALLOWED = {"threshold": 0.999, "fetch_schemes": "https", "fetch_hosts": "cdn.invalid"}


RAW = RawName(b"\xff\xfe".decode("utf-8", "surrogateescape"))  # no UTF-8, as others may send it


def body(**changes: object) -> bytes:
    return json.dumps({**BODY, **changes}).encode()


def refused() -> list[tuple[str, Event]]:
    """Events that end as a dead letter, and the reason."""
    picture = jpeg(scene(0))
    named = Event("raw", b"{}", [(RAW, b"1")])
    return [
        ("bad_message", named),
        ("bad_message", Event("r1", b"\xff\xfe not UTF-8")),
        ("bad_message", Event("r2", b"[" * DEEP + b"]" * DEEP)),
        ("bad_message", Event("r3", b'{"a":' * DEEP + b"1" + b"}" * DEEP)),
        ("bad_message", Event("huge", b"[" + b"1," * 400_000)),
        ("bad_message", Event("r4", b'{"schema":1,"image_id":"\\ud800","uri":"x"}')),
        ("bad_message", Event("r5", body(attributes={"n": "\x00" * 20_000}))),
        ("bad_message", Event("r6", body(uri=None))),
        ("bad_message", Event("r7", body(image_id=7))),
        ("bad_message", Event("r8", body(op="drop"))),
        ("bad_message", Event("r9", body(namespace="{other}:root"))),
        ("bad_message", Event("r10", body(occurred_at="yesterday"))),
        ("bad_message", Event("r11", body(attributes=[]))),
        ("bad_message", Event("r12", b"null")),
        ("bad_message", Event("r13", b'{"schema":1,"image_id":"x","uri":"x","n":NaN}')),
        ("bad_message", inline("r14", picture, attributes="{")),
        (
            "bad_message",
            Event("1e999", b'{"schema":1,"image_id":"x","uri":"x","attributes":{"n":1e999}}'),
        ),
        ("bad_message", inline("-1e999", picture, attributes='{"n":-1e999}')),
        ("bad_message", inline("r15", picture, namespace="a b")),
        ("bad_message", inline("r" * 10_240, picture)),
        ("bad_message", inline("", picture)),
        ("unsupported_schema", Event("r17", body(schema=2))),
        ("too_large", inline("40 MiB", bytes(40 << 20))),  # more than a worker's own limit of 32
        ("too_large", Event("lists", b"[" + b"[]," * (1 << 20) + b"[]]")),
        ("too_large", Event("spaces", b'"' + b" " * (30 << 20) + b'"')),
        ("too_large", Event("headers", body(), [("ab", b"")] * MANY)),
        ("too_large", inline("r20", picture, attributes="[" + "1," * (1 << 20) + "1]")),
        ("blocked_source", by_uri("r18", "https://\u0000/x.jpg")),
        ("blocked_source", by_uri("r19", "https://" + "a" * 100_000)),
    ]


def accepted() -> list[Event]:
    """Events with odd ids and headers that are as good as any other."""
    ids = [
        "1",
        "with\nnew\r\nlines",
        "*?[a-z]{ns}:meta",
        'le="+Inf"} 1\ndedup_events_total{op="add"} 7',
        "\x00\x01\x02",
        "' OR 1=1; --",
        "\u202eright to left, \U0001f5bc, e\u0301",
        "%7Bdefault%7D",
        "i" * 512,
    ]
    events = [inline(image_id, jpeg(scene(n + 1))) for n, image_id in enumerate(ids)]
    odd = inline("odd-headers", jpeg(scene(50)))
    odd.headers += [(RAW, b"\xff"), ("", b""), ("content-type ", b"x")]
    return [*events, odd]


def test_each_costs_itself_at_most(
    kafka_server: LocalKafka, redis_server: LocalRedis, topics: Topics, start_worker: StartWorker
) -> None:
    bound(Bounds(MOST, MOST))  # the reader of the test must read odd names, too
    bad, good = refused(), accepted()
    worker = start_worker(**ALLOWED, **PATIENT).wait_ready()
    hostile = [event for _, event in bad]
    # Good ones between bad ones, so that a bad one could take its neighbours along.
    sent = [event for pair in zip_longest(hostile, good) for event in pair if event is not None]
    sent += [tombstone("never-seen"), tombstone("")]
    publish(kafka_server.bootstrap, topics.images, sent)
    with Reader(kafka_server.bootstrap, topics.verdicts, topics.dead_letters) as reader:
        dead = reader.messages[topics.dead_letters]
        wanted = len(bad) + 1  # a tombstone without a name is the last of them
        reader.wait(
            lambda: len(dead) >= wanted and len(reader.messages[topics.verdicts]) >= len(good),
            SECONDS,
            "every outcome",
        )
        verdicts = {v["image_id"]: v["verdict"] for v in reader.verdicts(topics.verdicts)}
        reasons = [(m.key.decode(), dict(m.headers)["dedup-reason"].decode()) for m in dead]
        (raw,) = (message for message in dead if message.key == b"raw")
        (many,) = (message for message in dead if message.key == b"headers")
    assert raw.headers[0][0].encode() == b"\xff\xfe", "a dead letter was touched"
    assert all(name.startswith("dedup-") for name, _ in many.headers), "it has its headers"
    assert dict(many.headers)["dedup-omitted"] == b"value headers"
    assert verdicts == {event.key: "unique" for event in good}
    expected = [(event.key, reason) for reason, event in bad] + [("", "bad_message")]
    assert sorted(reasons) == sorted(expected)
    until(lambda: worker.metric("dedup_inflight_events") == 0, SECONDS, "nothing in work")
    assert worker.metric("dedup_events_total", op="add") < 100, "an id reached the metrics"
    assert worker.get("/readyz").status_code == 200
    assert check(Store(redis_server.client()), NAMESPACE) == []
