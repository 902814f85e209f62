"""The three messages: image event in, verdict and dead letter out.

Owns the wire formats and their limits. Knows nothing of Kafka clients, Redis or pixels.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from worker.errors import EventError, Reason

SCHEMA = 1
RECORD_BYTES, HEADER_BYTES = 512, 160  # what the objects of each take besides their contents
NAMESPACE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
RFC3339 = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?(Z|[+-][0-9]{2}:[0-9]{2})",
    re.ASCII | re.IGNORECASE,
)
"""To nanoseconds; the day and the time may be none."""

Headers = tuple[tuple[str, bytes], ...]


class Op(StrEnum):
    """What an event asks for."""

    ADD = "add"
    CHECK = "check"
    DELETE = "delete"


@dataclass(frozen=True, slots=True)
class Omitted:
    """Stands for the value of a record that was not taken in whole, and says why."""

    missing: str  # of value, key and headers, with spaces between
    reason: Reason
    detail: str
    size: int  # bytes that were read to find out
    first: int | None = None  # where it stands for several events: the first one's offset

    def __len__(self) -> int:
        return 0


@dataclass(frozen=True, slots=True)
class Record:
    """One Kafka record as it was consumed: bytes, not yet believed.

    `topic_id` is Kafka's own (KIP-516), another one where the topic was made anew; empty where the
    brokers tell none.
    """

    topic: str
    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: Headers = ()
    leader_epoch: int = -1
    omitted: Omitted | None = None
    topic_id: str = ""

    @property
    def size(self) -> int:
        """Bytes it takes to hold: key, value, headers, and the objects they are."""
        headers = sum(HEADER_BYTES + len(name) + len(value) for name, value in self.headers)
        return RECORD_BYTES + len(self.key or b"") + len(self.value or b"") + headers


@dataclass(frozen=True, slots=True)
class MessageLimits:
    """How long an id (bytes of UTF-8), `attributes` and any JSON (bytes of it) may be.

    And which namespaces may be named: any where none is told.
    """

    max_id_bytes: int = 512
    max_attributes_bytes: int = 16 * 1024
    max_json_bytes: int = 1024 * 1024
    namespaces: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ImageEvent:
    """A parsed event; `data` (the image itself) or `uri` is set, deletes need neither."""

    image_id: str
    op: Op
    namespace: str = "default"
    uri: str | None = None
    data: bytes | None = field(default=None, repr=False)
    occurred_at: str | None = None
    attributes: dict[str, Any] | None = None


class _EventBody(BaseModel):
    """The JSON value of an event; unknown fields are ignored, so that producers may run ahead."""

    model_config = ConfigDict(extra="ignore", strict=True)

    image_id: str
    uri: str | None = None
    op: str = "add"
    namespace: str = "default"
    occurred_at: str | None = None
    attributes: dict[str, Any] | None = None


def parse(record: Record, limits: MessageLimits) -> ImageEvent:
    """Read an event from a record: JSON, the image itself, or a tombstone (design: input event).

    Raises EventError (`bad_message`, `unsupported_schema`, `too_large`) for anything else.
    """
    if record.omitted is not None:
        raise EventError(record.omitted.reason, record.omitted.detail)
    headers = {name.lower(): value for name, value in record.headers}
    if record.value is None:
        event = ImageEvent(
            _key_id(record, headers), Op.DELETE, _namespace(_text(headers, "namespace"))
        )
    elif _text(headers, "content-type", "").strip().lower().startswith("image/"):
        event = _parse_inline(record, headers, limits)
    else:
        event = _parse_json(record.value, limits)
    _check_limits(event, limits)
    return event


def _parse_inline(record: Record, headers: dict[str, bytes], limits: MessageLimits) -> ImageEvent:
    _check_schema(_json_header(headers, "schema", SCHEMA, limits))
    attributes = _json_header(headers, "attributes", None, limits)
    if attributes is not None and not isinstance(attributes, dict):
        raise _bad("header attributes: not a JSON object")
    occurred_at = _text(headers, "occurred_at") or _text(headers, "ce_time")
    return ImageEvent(
        image_id=_key_id(record, headers),
        op=_op(_text(headers, "op", "add")),
        namespace=_namespace(_text(headers, "namespace")),
        data=record.value,
        occurred_at=_rfc3339(occurred_at),
        attributes=attributes,
    )


def _parse_json(value: bytes, limits: MessageLimits) -> ImageEvent:
    document = _load_json(value, "value", limits)
    if not isinstance(document, dict):
        raise _bad("value: not a JSON object")
    if "schema" not in document:
        raise _bad("schema: field required")
    _check_schema(document["schema"])
    try:
        body = _EventBody.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise _bad(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    op = _op(body.op)
    if op is not Op.DELETE and not body.uri:
        raise _bad("uri: field required")
    return ImageEvent(
        image_id=body.image_id,
        op=op,
        namespace=_namespace(body.namespace),
        uri=body.uri,
        occurred_at=_rfc3339(body.occurred_at),
        attributes=body.attributes,
    )


def _load_json(value: bytes, where: str, limits: MessageLimits) -> Any:
    if len(value) > limits.max_json_bytes:  # in memory it may be thirty times as large
        detail = f"{where}: {len(value)} bytes of JSON, allowed are {limits.max_json_bytes}"
        raise EventError(Reason.TOO_LARGE, detail)
    try:
        return from_json(value, allow_inf_nan=False)
    except ValueError as error:
        raise _bad(f"{where}: {error}") from None


def _check_schema(schema: object) -> None:
    if type(schema) is not int:
        raise _bad("schema: not an integer")
    if schema != SCHEMA:
        raise EventError(Reason.UNSUPPORTED_SCHEMA, f"schema {schema}, this worker knows {SCHEMA}")


def _check_limits(event: ImageEvent, limits: MessageLimits) -> None:
    if limits.namespaces and event.namespace not in limits.namespaces:
        raise _bad(f"namespace: {event.namespace!r} is none of those allowed")
    try:
        size = len(event.image_id.encode())
    except UnicodeEncodeError:
        raise _bad("image_id: not valid Unicode") from None
    if not 1 <= size <= limits.max_id_bytes:
        raise _bad(f"image_id: {size} bytes, allowed are 1 to {limits.max_id_bytes}")
    if event.attributes is not None:
        try:
            text = json.dumps(event.attributes, ensure_ascii=False, allow_nan=False)
            size = len(text.encode())
        except (UnicodeEncodeError, RecursionError, ValueError) as error:
            raise _bad(f"attributes: {type(error).__name__}") from None
        if size > limits.max_attributes_bytes:
            raise _bad(f"attributes: {size} bytes, allowed are {limits.max_attributes_bytes}")


def _key_id(record: Record, headers: dict[str, bytes]) -> str:
    """The image id of an event that is no JSON: its key, or CloudEvents' subject or id."""
    if record.key is None:
        given = _text(headers, "ce_subject") or _text(headers, "ce_id")
        if given is None:
            raise _bad("key: null; the image id is the key")
        return str(given)
    try:
        return record.key.decode()
    except UnicodeDecodeError:
        raise _bad("key: not UTF-8") from None


def _text(headers: dict[str, bytes], name: str, default: Any = None) -> Any:
    value = headers.get(name)
    if value is None:
        return default
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise _bad(f"header {name}: not UTF-8") from None


def _json_header(headers: dict[str, bytes], name: str, default: Any, limits: MessageLimits) -> Any:
    value = headers.get(name)
    return default if value is None else _load_json(value, f"header {name}", limits)


def _op(name: str) -> Op:
    try:
        return Op(name)
    except ValueError:
        raise _bad(f"op: {name[:40]!r} is none of {', '.join(Op)}") from None


def _namespace(name: str | None) -> str:
    if name is None:
        return "default"
    if not NAMESPACE.fullmatch(name):
        raise _bad("namespace: wants 1 to 128 letters, digits, '.', '_' or '-'")
    return name


def _rfc3339(moment: str | None) -> str | None:
    """`moment` unchanged if it is an RFC 3339 date and time with an offset."""
    if moment is None:
        return None
    if not RFC3339.fullmatch(moment):
        raise _bad("occurred_at: not an RFC 3339 time with an offset")
    try:
        datetime.fromisoformat(moment.upper())
    except ValueError:
        raise _bad("occurred_at: not a day or a time that there is") from None
    return moment


def _bad(detail: str) -> EventError:
    return EventError(Reason.BAD_MESSAGE, detail)


class VerdictKind(StrEnum):
    """What was found of an image."""

    UNIQUE = "unique"
    DUPLICATE = "duplicate"
    EXACT = "exact"


class Match(BaseModel):
    """An earlier image and how similar it is (cosine, rounded to 6 digits)."""

    image_id: str
    similarity: float


class Verdict(BaseModel):
    """The answer to an event (design: verdict)."""

    schema_: int = Field(SCHEMA, serialization_alias="schema")
    verdict_id: str
    image_id: str
    namespace: str
    verdict: VerdictKind
    duplicate_of: str | None
    similarity: float | None
    best_match: Match | None
    matches: list[Match]
    threshold: float
    model_id: str
    clusters_probed: int
    vectors_compared: int
    truncated: bool
    occurred_at: str | None
    decided_at: str
    attributes: dict[str, Any] | None

    def to_json(self) -> bytes:
        """The Kafka value: compact UTF-8 JSON, keys in the order declared here."""
        return self.model_dump_json(by_alias=True).encode()


def verdict_id(namespace: str, image_id: str, sequence: int) -> str:
    """The same for every delivery of the event that was inserted as `sequence`: 32 hex digits."""
    return _digest("verdict", namespace, image_id, str(sequence))


def check_id(namespace: str, image_id: str, record: Record) -> str:
    """A `check` inserts nothing; its place in the topic identifies it instead."""
    position = f"{record.topic}-{record.partition}@{record.offset}"
    return _digest("check", namespace, image_id, position)


def _digest(*parts: str) -> str:
    # Lengths are hashed too, so that no two lists of parts can collide by shifting characters.
    text = "".join(f"{len(part)}:{part}" for part in parts)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def now_rfc3339() -> str:
    """The current time in UTC with milliseconds (RFC 3339)."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def dead_letter_headers(record: Record, error: EventError, version: str) -> list[tuple[str, bytes]]:
    """The original headers, then why and where from; the key and value travel unchanged.

    Where they do not, as they were too large to take in, it says what is missing; they are where
    it came from.
    """
    omitted = record.omitted
    added = {
        "dedup-reason": str(error.reason),
        "dedup-detail": error.detail[:1000],
        "dedup-topic": record.topic,
        "dedup-partition": str(record.partition),
        "dedup-offset": str(record.offset),
        "dedup-worker-version": version,
    }
    if omitted is not None:
        added["dedup-omitted"] = omitted.missing
        if omitted.first is not None:
            added |= {"dedup-offset": str(omitted.first), "dedup-last-offset": str(record.offset)}
    return [
        *record.headers,
        *((name, text.encode(errors="replace")) for name, text in added.items()),
    ]
