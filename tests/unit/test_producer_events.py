"""The records made of what a source found."""

import json
from pathlib import Path

import pytest

from producer.events import UNKNOWN_IMAGE, EventMaker, Outgoing
from producer.sources import Found, Rejected
from worker.messages import ImageEvent, MessageLimits, Op, Record, parse

LINK = "https://images.example/one.jpg"
MAX_BYTES = 200_000


def read_back(outgoing: Outgoing | Rejected) -> ImageEvent:
    """What the worker's own parser makes of it."""
    assert isinstance(outgoing, Outgoing), outgoing
    record = Record("images", 0, 0, 0, outgoing.key, outgoing.value, outgoing.headers)
    return parse(record, MessageLimits())


def file_found(tmp_path: Path, name: str, data: bytes) -> Found:
    path = tmp_path / name
    path.write_bytes(data)
    return Found(name, name, path.as_uri(), path)


def test_a_link_becomes_a_json_event() -> None:
    maker = EventMaker(MAX_BYTES, op=Op.CHECK, namespace="shop", key_prefix="run/")
    outgoing = maker.make(Found("line 2", "7", LINK, fields={"attributes": {"line": 2}}))
    event = read_back(outgoing)
    assert (event.image_id, event.uri, event.data) == ("run/7", LINK, None)
    assert (event.op, event.namespace, event.attributes) == (Op.CHECK, "shop", {"line": 2})
    assert event.occurred_at is not None
    assert isinstance(outgoing, Outgoing)
    assert outgoing.key == b"run/7"


def test_what_an_event_says_itself_wins_over_the_flags() -> None:
    maker = EventMaker(MAX_BYTES, op=Op.CHECK, namespace="shop")
    said = {"op": "delete", "namespace": "own", "occurred_at": "2026-01-02T03:04:05Z"}
    event = read_back(maker.make(Found("line 1", "7", None, fields=said)))
    assert (event.op, event.namespace) == (Op.DELETE, "own")
    assert event.occurred_at == "2026-01-02T03:04:05Z"


def test_a_file_travels_inline_with_its_fields_as_headers(tmp_path: Path) -> None:
    maker = EventMaker(MAX_BYTES, inline=True, namespace="shop", op=Op.CHECK)
    outgoing = maker.make(file_found(tmp_path, "ü.jpg", b"bytes"))
    event = read_back(outgoing)
    assert (event.image_id, event.data, event.uri) == ("ü.jpg", b"bytes", None)
    assert (event.op, event.namespace) == (Op.CHECK, "shop")
    assert isinstance(outgoing, Outgoing)
    assert dict(outgoing.headers)["content-type"] == b"image/jpeg"


@pytest.mark.parametrize("name", ["notes.txt", "event.json", "no-suffix", "page.html"])
def test_a_file_that_is_no_image_is_still_an_image_event(tmp_path: Path, name: str) -> None:
    # Or the worker would read a JSON file of the folder as an event of its own.
    other = b'{"schema":1,"image_id":"other","op":"delete"}'
    outgoing = EventMaker(MAX_BYTES, inline=True).make(file_found(tmp_path, name, other))
    assert read_back(outgoing).data == other
    assert isinstance(outgoing, Outgoing)
    assert dict(outgoing.headers)["content-type"] == UNKNOWN_IMAGE.encode()


def test_an_empty_file_is_an_empty_value_not_a_tombstone(tmp_path: Path) -> None:
    outgoing = EventMaker(MAX_BYTES, inline=True).make(file_found(tmp_path, "a.jpg", b""))
    assert read_back(outgoing).data == b""
    assert read_back(outgoing).op is Op.ADD


def test_an_extra_field_cannot_turn_an_inline_image_into_json(tmp_path: Path) -> None:
    found = file_found(tmp_path, "a.jpg", b"bytes")
    found.fields.update({"content-type": "application/json", "attributes": "{}"})
    rejected = EventMaker(MAX_BYTES, inline=True).make(found)
    assert isinstance(rejected, Rejected)
    del found.fields["attributes"]
    assert read_back(EventMaker(MAX_BYTES, inline=True).make(found)).data == b"bytes"


def test_a_delete_needs_no_bytes() -> None:
    maker = EventMaker(MAX_BYTES, inline=True, op=Op.DELETE)
    outgoing = maker.make(Found("line 1", "7", None))
    assert isinstance(outgoing, Outgoing)
    assert json.loads(outgoing.value)["op"] == "delete"


@pytest.mark.parametrize(
    "fields",
    [
        {"op": "forget"},
        {"namespace": "a b"},
        {"schema": 2},
        {"schema": "1"},
        {"attributes": "text"},
        {"attributes": {"a": "b" * 20_000}},
        {"occurred_at": "yesterday"},
        {"attributes": {"a": float("nan")}},
    ],
)
def test_what_the_worker_would_refuse_is_reported_with_its_place(fields: dict[str, object]) -> None:
    rejected = EventMaker(MAX_BYTES).make(Found("line 9", "7", LINK, fields=fields))
    assert isinstance(rejected, Rejected)
    assert rejected.place == "line 9"


@pytest.mark.parametrize("image_id", ["a" * 513, "\ud800"])
def test_an_id_no_key_can_hold_is_reported(image_id: str) -> None:
    assert isinstance(EventMaker(MAX_BYTES).make(Found("line 9", image_id, LINK)), Rejected)


def test_a_file_larger_than_a_message_is_reported_unread(tmp_path: Path) -> None:
    path = tmp_path / "huge.jpg"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    rejected = EventMaker(MAX_BYTES, inline=True).make(Found("huge.jpg", "h", path.as_uri(), path))
    assert isinstance(rejected, Rejected)
    assert "too large to send inline" in rejected.reason


def test_a_file_that_went_away_is_reported(tmp_path: Path) -> None:
    found = Found("a.jpg", "a.jpg", (tmp_path / "a.jpg").as_uri(), tmp_path / "a.jpg")
    assert isinstance(EventMaker(MAX_BYTES, inline=True).make(found), Rejected)


def test_links_are_fetched_to_be_sent_inline() -> None:
    maker = EventMaker(MAX_BYTES, inline=True, fetch=lambda uri: uri.encode())
    event = read_back(maker.make(Found("line 2", "7", LINK)))
    assert (event.data, event.uri) == (LINK.encode(), None)
