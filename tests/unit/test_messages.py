"""Every way an event can be written, rightly and wrongly."""

import json
import tracemalloc
from dataclasses import replace
from typing import Any

import pytest

from worker.errors import EventError, Reason
from worker.messages import (
    RECORD_BYTES,
    MessageLimits,
    Omitted,
    Op,
    Record,
    check_id,
    dead_letter_headers,
    parse,
    verdict_id,
)

LIMITS = MessageLimits()
GOOD = {"schema": 1, "image_id": "a", "uri": "https://example.com/a.jpg"}


def record(
    value: bytes | None, key: bytes | None = b"a", headers: tuple[tuple[str, bytes], ...] = ()
) -> Record:
    return Record("images", 2, 7, 1_700_000_000_000, key, value, headers)


def event_json(**changes: Any) -> bytes:
    body = {**GOOD, **changes}
    return json.dumps({name: value for name, value in body.items() if value is not ...}).encode()


def reason_of(*args: Any, **kwargs: Any) -> tuple[Reason, str]:
    with pytest.raises(EventError) as caught:
        parse(record(*args, **kwargs), LIMITS)
    return caught.value.reason, caught.value.detail


def test_json_event_with_everything() -> None:
    event = parse(
        record(
            event_json(
                op="check",
                namespace="shop-1",
                occurred_at="2026-01-02T03:04:05Z",
                attributes={"sku": "1", "deep": {"list": [1, 2.5, None]}},
            )
        ),
        LIMITS,
    )
    assert (event.image_id, event.op, event.namespace) == ("a", Op.CHECK, "shop-1")
    assert event.uri == "https://example.com/a.jpg"
    assert event.occurred_at == "2026-01-02T03:04:05Z"
    assert event.attributes == {"sku": "1", "deep": {"list": [1, 2.5, None]}}


def test_optional_fields_have_defaults_and_unknown_ones_are_ignored() -> None:
    event = parse(record(event_json(colour="blue")), LIMITS)
    assert (event.op, event.namespace, event.occurred_at, event.attributes) == (
        Op.ADD,
        "default",
        None,
        None,
    )


def test_inline_image_takes_its_fields_from_key_and_headers() -> None:
    event = parse(
        record(
            b"\xff\xd8bytes",
            key="ü1".encode(),
            headers=(
                ("Content-Type", b"image/jpeg"),
                ("namespace", b"shop"),
                ("op", b"check"),
                ("attributes", b'{"a":1}'),
            ),
        ),
        LIMITS,
    )
    assert event.data == b"\xff\xd8bytes"
    assert (event.image_id, event.namespace, event.op) == ("ü1", "shop", Op.CHECK)
    assert event.attributes == {"a": 1}


def test_cloudevents_binary_mode() -> None:
    headers = (
        ("content-type", b"image/png"),
        ("ce_id", b"evt-1"),
        ("ce_source", b"/shop"),
        ("ce_type", b"image.new"),
        ("ce_time", b"2026-01-02T03:04:05+01:00"),
    )
    event = parse(record(b"png", headers=headers), LIMITS)
    assert (event.image_id, event.occurred_at) == ("a", "2026-01-02T03:04:05+01:00")
    assert parse(record(b"png", key=None, headers=headers), LIMITS).image_id == "evt-1"


def test_tombstone_and_delete_forget_the_image() -> None:
    tombstone = parse(record(None, headers=(("namespace", b"shop"),)), LIMITS)
    assert (tombstone.op, tombstone.image_id, tombstone.namespace) == (Op.DELETE, "a", "shop")
    assert parse(record(event_json(op="delete", uri=...)), LIMITS).op is Op.DELETE


def test_an_empty_inline_image_is_no_tombstone() -> None:
    event = parse(record(b"", headers=(("content-type", b"image/jpeg"),)), LIMITS)
    assert (event.op, event.data) == (Op.ADD, b"")


NO_TIMES = [
    *("2020-01-01ẗ00:00:00Z", "20200101T00Z", "20200101T000000Z", "2020-W01-1T00:00:00Z"),
    *(
        "2020-01-01T00:00Z",
        "2020-01-01T00:00:00,5Z",
        "2020-01-01T00:00:00.Z",
        "2020-01-01 00:00:00Z",
    ),
    *("2020-01-01T00:00:00+0000", "2020-01-01T00:00:00+00:00:00", "2020-01-01T00:00:00Z\n"),
    *(
        "2020-02-30T00:00:00Z",
        "2020-01-01T25:00:00Z",
        "2020-01-01T00:00:00+99:99",
        "٢٠٢٠-01-01T00:00:00Z",
    ),
    "2020-01-01T00:00:00." + "0" * 1_000_000 + "Z",  # a verdict repeats it
]


@pytest.mark.parametrize(
    "moment",
    [
        *("2026-01-02T03:04:05Z", "2026-01-02t03:04:05z", "2026-01-02T03:04:05.123456789-23:59"),
        *("9999-12-31T23:59:59.9+00:00", "0001-01-01T00:00:00+14:00"),
    ],
)
def test_a_time_comes_back_as_it_was_written(moment: str) -> None:
    assert parse(record(event_json(occurred_at=moment)), LIMITS).occurred_at == moment


@pytest.mark.parametrize(
    "written", [b"Image/JPEG", b" image/jpeg ", b"\timage/jpeg", b"IMAGE/png;q=1"]
)
def test_media_types_have_no_case(written: bytes) -> None:
    headers = (("Content-Type", written),)
    assert parse(record(b"bytes", headers=headers), LIMITS).data == b"bytes"


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"not json",
        b"[1]",
        b"null",
        b'"text"',
        b"\xff\xfe{}",
        b'{"schema":1,"image_id":"a","uri":"x"',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        event_json(image_id=...),
        event_json(image_id=None),
        event_json(image_id=7),
        event_json(image_id=""),
        event_json(image_id="x" * 513),
        event_json(image_id="x" * 10_240),
        event_json(uri=...),
        event_json(uri=None),
        event_json(uri=["x"]),
        event_json(schema=...),
        event_json(schema="1"),
        event_json(schema=True),
        event_json(schema=1.0),
        event_json(op="ADD"),
        event_json(op=None),
        event_json(op="drop"),
        event_json(namespace=""),
        event_json(namespace="a b"),
        event_json(namespace="{x}"),
        event_json(namespace="n" * 129),
        event_json(occurred_at="yesterday"),
        event_json(occurred_at="2026-01-02"),
        event_json(occurred_at="2026-01-02T03:04:05"),
        *(event_json(occurred_at=each) for each in NO_TIMES),
        event_json(attributes=[1]),
        event_json(attributes={"a": "x" * 16_384}),
        b'{"schema":1,"image_id":"a","uri":"x","attributes":{"a":NaN}}',
        b'{"schema":1,"image_id":"\\ud800","uri":"x"}',
    ],
)
def test_bad_messages_say_what_is_wrong(value: bytes) -> None:
    reason, detail = reason_of(value)
    assert reason is Reason.BAD_MESSAGE
    assert detail and len(detail) < 300


def test_another_schema_is_named_as_such() -> None:
    assert reason_of(event_json(schema=2))[0] is Reason.UNSUPPORTED_SCHEMA


@pytest.mark.parametrize(
    ("key", "headers"),
    [
        (None, (("content-type", b"image/png"),)),
        (b"\xff", (("content-type", b"image/png"),)),
        (b"a", (("content-type", b"image/png"), ("attributes", b"[]"))),
        (b"a", (("content-type", b"image/png"), ("op", b"\xff"))),
        (b"a", (("content-type", b"image/png"), ("schema", b"x"))),
        (b"", (("content-type", b"image/png"),)),
    ],
)
def test_bad_inline_events(key: bytes | None, headers: tuple[tuple[str, bytes], ...]) -> None:
    assert reason_of(b"data", key=key, headers=headers)[0] is Reason.BAD_MESSAGE


def test_a_tombstone_without_key_is_a_bad_message() -> None:
    assert reason_of(None, key=None)[0] is Reason.BAD_MESSAGE


@pytest.mark.parametrize("image_id", ["x", "a\nb", "{tag}*?[", 'quo"te\\', "日本", "x" * 512])
def test_odd_ids_are_fine(image_id: str) -> None:
    assert parse(record(event_json(image_id=image_id)), LIMITS).image_id == image_id


def test_the_limits_are_settings() -> None:
    tight = MessageLimits(max_id_bytes=2, max_attributes_bytes=8)
    assert parse(record(event_json(image_id="é")), tight).image_id == "é"
    for value in (event_json(image_id="abc"), event_json(attributes={"long": 1})):
        with pytest.raises(EventError):
            parse(record(value), tight)


def test_namespaces_that_are_not_allowed_are_bad_messages() -> None:
    some = MessageLimits(namespaces=("shop", "default"))
    assert parse(record(event_json(namespace="shop")), some).namespace == "shop"
    assert parse(record(event_json()), some).namespace == "default"
    assert parse(record(None, headers=(("namespace", b"shop"),)), some).namespace == "shop"
    elsewhere = (("namespace", b"elsewhere"),)
    for other in (
        record(event_json(namespace="elsewhere")),
        record(b"bytes", headers=(("content-type", b"image/png"), *elsewhere)),
        record(None, headers=elsewhere),
    ):
        assert parse(other, LIMITS).namespace == "elsewhere"
        with pytest.raises(EventError, match="elsewhere") as caught:
            parse(other, some)
        assert caught.value.reason is Reason.BAD_MESSAGE


def test_more_json_than_allowed_is_not_parsed() -> None:
    """Wherever it is, and whatever it is."""
    limits = MessageLimits(max_json_bytes=100)
    image = (("content-type", b"image/png"), ("attributes", b"[" * 101))
    for long in (record(b"[" * 101), record(b" " * 101), record(b"", headers=image)):
        with pytest.raises(EventError, match="101 bytes of JSON, allowed are 100") as caught:
            parse(long, limits)
        assert caught.value.reason is Reason.TOO_LARGE
    assert parse(record(event_json()), MessageLimits(max_json_bytes=len(event_json()))).image_id


def test_what_was_not_taken_in_is_said_of_one_event_and_of_several() -> None:
    one = Omitted("value", Reason.TOO_LARGE, "9 bytes", 9)
    several = Omitted("key value headers", Reason.BAD_MESSAGE, "broken", 9, first=5)
    found = []
    for omitted in (one, several):
        cut = replace(record(b"", headers=(("h", b"1"),)), offset=7, omitted=omitted)
        with pytest.raises(EventError, match=omitted.detail) as caught:
            parse(cut, LIMITS)
        headers = dead_letter_headers(cut, caught.value, "v")
        assert headers[0] == ("h", b"1")
        found.append({name.removeprefix("dedup-"): value.decode() for name, value in headers})
    assert (found[0]["omitted"], found[0]["offset"]) == ("value", "7")
    assert "last-offset" not in found[0]
    assert (found[1]["omitted"], found[1]["reason"]) == ("key value headers", "bad_message")
    assert (found[1]["offset"], found[1]["last-offset"]) == ("5", "7")


def test_headers_count_as_what_is_held() -> None:
    bare = record(b"123", key=b"12").size
    assert record(b"", key=None).size < bare
    assert record(b"123", key=b"12", headers=(("name", b"12345"),)).size >= bare + 9


@pytest.mark.parametrize("headers", [0, 10, 1_000])
def test_a_record_counts_as_what_it_takes(headers: int) -> None:
    """Of four bytes on the wire, a header is some two hundred once it is an object."""
    tracemalloc.start()
    try:
        made = [
            record(b"%d" % n, headers=tuple((f"{n:03x}", b"%03x" % n) for n in range(headers)))
            for n in range(100)
        ]
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    counted = sum(each.size for each in made)
    # Small numbers and names are shared, and tuples come from what was freed before.
    assert 0.9 * taken < counted < 2 * taken + len(made) * RECORD_BYTES


def test_ids_of_verdicts_depend_on_their_place_alone() -> None:
    assert verdict_id("n", "a", 1) == verdict_id("n", "a", 1)
    different = {
        verdict_id("n", "a", 1),
        verdict_id("n", "a", 2),
        verdict_id("n", "b", 1),
        verdict_id("m", "a", 1),
        verdict_id("na", "", 1),
        check_id("n", "a", record(b"")),
    }
    assert len(different) == 6


def test_dead_letter_headers_come_after_the_original_ones() -> None:
    original = record(b"x", headers=(("trace", b"1"),))
    error = EventError(Reason.BAD_MESSAGE, "why\n" + "x" * 5000)
    headers = dead_letter_headers(original, error, "9.9")
    assert headers[0] == ("trace", b"1")
    added = dict(headers[1:])
    assert added["dedup-reason"] == b"bad_message"
    assert len(added["dedup-detail"]) == 1000
    assert (added["dedup-topic"], added["dedup-partition"], added["dedup-offset"]) == (
        b"images",
        b"2",
        b"7",
    )
    assert added["dedup-worker-version"] == b"9.9"
