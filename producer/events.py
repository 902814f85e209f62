"""Turns what a source found into Kafka records: a JSON event, or the image itself with headers.

Owns the producer's side of the wire format and checks it with the worker's own parser, so that a
line the worker would refuse is reported here with its place. It must not know Kafka clients.
"""

import json
import mimetypes
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from producer.sources import Found, Rejected
from worker.errors import DedupError
from worker.messages import SCHEMA, MessageLimits, Op, Record, now_rfc3339, parse

# The worker looks at the bytes, not at the type; this says only "not JSON but an image".
UNKNOWN_IMAGE = "image/x-unknown"
HEADER_FIELDS = ("schema", "op", "namespace", "occurred_at", "attributes")
# Room for key, headers and framing beside an inline image, in bytes.
ENVELOPE_BYTES = 64 * 1024

Fetch = Callable[[str], bytes]


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A record to publish: key and value as bytes, headers as Kafka has them."""

    place: str
    key: bytes
    value: bytes
    headers: tuple[tuple[str, bytes], ...] = ()

    @property
    def size(self) -> int:
        """Bytes it takes, about."""
        return len(self.key) + len(self.value) + sum(len(k) + len(v) for k, v in self.headers)


@dataclass(frozen=True, slots=True)
class EventMaker:
    """Makes records; `op` and `namespace` fill what an event does not say itself.

    `inline` sends bytes instead of uris: files are read, links fetched with `fetch`.
    """

    max_message_bytes: int
    limits: MessageLimits = field(default_factory=MessageLimits)
    op: Op | None = None
    namespace: str | None = None
    key_prefix: str = ""
    inline: bool = False
    fetch: Fetch | None = None

    def make(self, found: Found) -> Outgoing | Rejected:
        """The record of one find, or why there can be none."""
        fields = {"schema": SCHEMA, "occurred_at": now_rfc3339(), **found.fields}
        if self.op is not None:
            fields.setdefault("op", self.op.value)
        if self.namespace is not None:
            fields.setdefault("namespace", self.namespace)
        image_id = self.key_prefix + found.image_id
        try:
            if self.inline and fields.get("op") != Op.DELETE:
                outgoing = self._inline(found, image_id, fields)
            else:
                outgoing = _json_event(found, image_id, fields)
            if outgoing.size > self.max_message_bytes:
                raise ValueError(f"{outgoing.size} bytes, Kafka takes {self.max_message_bytes}")
            self._check(outgoing)
        except (DedupError, OSError, ValueError, RecursionError) as error:
            return Rejected(found.place, str(error))
        return outgoing

    def _inline(self, found: Found, image_id: str, fields: dict[str, object]) -> Outgoing:
        if found.path is not None:
            data = _read(found.path, self.max_message_bytes - ENVELOPE_BYTES)
        elif found.uri is not None and self.fetch is not None:
            data = self.fetch(found.uri)
        else:
            raise ValueError("no bytes to send inline: there is neither a file nor a uri")
        kind = mimetypes.guess_type(found.uri or "")[0] or UNKNOWN_IMAGE
        headers = {"content-type": kind if kind.startswith("image/") else UNKNOWN_IMAGE}
        for name in HEADER_FIELDS:
            value = fields.get(name)
            if value is not None:
                text = isinstance(value, str) and name != "attributes"
                headers[name] = str(value) if text else _compact(value)
        encoded = tuple((name, text.encode()) for name, text in headers.items())
        return Outgoing(found.place, image_id.encode(), data, encoded)

    def _check(self, outgoing: Outgoing) -> None:
        parse(
            Record("", 0, 0, 0, outgoing.key, outgoing.value, outgoing.headers),
            self.limits,
        )


def _json_event(found: Found, image_id: str, fields: dict[str, object]) -> Outgoing:
    event = {"schema": fields["schema"], "image_id": image_id, "uri": found.uri, **fields}
    return Outgoing(found.place, image_id.encode(), _compact(event).encode())


def _compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _read(path: Path, limit: int) -> bytes:
    """The whole file; raises ValueError beyond `limit` bytes without reading further."""
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"larger than {limit} bytes, too large to send inline")
    return data
