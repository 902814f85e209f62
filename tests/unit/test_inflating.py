"""Compressed batches are read within bounds of memory, and what lies beyond is told of."""

import gzip
import struct
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
from kafka import codec
from kafka.errors import CorruptRecordError, UnsupportedCodecError
from kafka.record import memory_records
from kafka.record.default_records import ControlRecord, DefaultRecordBatch
from kafka.record.memory_records import MemoryRecords, MemoryRecordsBuilder
from kafka.record.util import calc_crc32c

from tests.conftest import missing
from worker.errors import Reason
from worker.header_names import RawName
from worker.inflating import Bounds, bound
from worker.messages import Omitted

RECORD, BATCH, HEADERS = 100_000, 1_000_000, 50
NONE, GZIP, SNAPPY, LZ4, ZSTD = range(5)
CODECS = pytest.mark.parametrize("kind", [NONE, GZIP, SNAPPY, LZ4, ZSTD])
COMPRESSED = pytest.mark.parametrize("kind", [GZIP, SNAPPY, LZ4, ZSTD])
PACKAGES = {SNAPPY: "python-snappy", LZ4: "lz4", ZSTD: "zstandard"}
FIRST = 40  # offset of a batch
HEADER = DefaultRecordBatch.HEADER_STRUCT.size


@pytest.fixture(autouse=True)
def bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_records, "DefaultRecordBatch", DefaultRecordBatch)
    bound(Bounds(RECORD, BATCH, HEADERS))


def batch(
    kind: int, *values: bytes | None, key: bytes = b"k", header: bytes = b"1", headers: int = 1
) -> bytes:
    """A batch as a producer makes it."""
    has = [codec.has_snappy, codec.has_lz4, codec.has_zstd]
    if kind in PACKAGES and not has[kind - SNAPPY]():
        missing(PACKAGES[kind], f"{PACKAGES[kind]} is not installed")
    builder = MemoryRecordsBuilder(magic=2, compression_type=kind, batch_size=1 << 30)
    for value in values:
        builder.append(timestamp=7, key=key, value=value, headers=[("h", header)] * headers)
    builder.close()
    data = bytearray(builder.buffer())
    struct.pack_into(">q", data, 0, FIRST)
    return bytes(data)


def repacked(data: bytes, body: bytes) -> bytes:
    """The same batch with other compressed records."""
    made = bytearray(data[:HEADER] + body)
    struct.pack_into(">i", made, 8, len(made) - 12)
    struct.pack_into(">I", made, 17, calc_crc32c(memoryview(made)[21:]))
    return bytes(made)


def read(data: bytes) -> list[Any]:
    (found,) = MemoryRecords(data)
    assert found.validate_crc()
    return list(found)


@CODECS
def test_what_fits_is_read_as_it_is(kind: int) -> None:
    values = [b"", b"x" * 90_000, None, bytes(range(256)) * 200, b"\x00"]
    found = read(batch(kind, *values))
    assert [record.value for record in found] == values
    assert [record.offset for record in found] == [FIRST + n for n in range(len(values))]
    assert {record.key for record in found} == {b"k"}
    assert {tuple(record.headers) for record in found} == {(("h", b"1"),)}
    assert all(isinstance(record.value, bytes | None) for record in found)


def outcome(reader: type[DefaultRecordBatch], data: bytes) -> list[Any] | str:
    """What a reader makes of a batch: its records' fields, or that it is broken."""
    try:
        return [
            (r.size_in_bytes, r.offset, r.timestamp, r.timestamp_type, r.key, r.value, *r.headers)
            for r in reader(memoryview(data))
        ]
    except CorruptRecordError:
        return "broken"


@pytest.mark.parametrize("flags", [0, 0x08], ids=["created", "appended"])
def test_each_byte_is_understood_as_kafka_python_does(flags: int) -> None:
    """Whatever one byte is changed to."""
    bound(Bounds(RECORD, BATCH, headers=1 << 63))
    ours = memory_records.DefaultRecordBatch
    builder = MemoryRecordsBuilder(magic=2, compression_type=0, batch_size=1 << 20)
    builder.append(9, b"key", b"value", [("name", b"1"), ("", None)])
    builder.append(1_000_007, None, b"v" * 100, [])
    builder.append(8, b"", None, [("h", b"")])
    builder.close()
    data = bytearray(builder.buffer())
    data[22] |= flags
    data[27:43] = struct.pack(">qq", 5, 2_000_000)  # the first and the last time
    assert len(outcome(ours, bytes(data))) == 3
    kinds = set()
    for at in range(HEADER, len(data)):
        for other in range(256):
            changed = bytes(data[:at]) + bytes([other]) + bytes(data[at + 1 :])
            found, wanted = outcome(ours, changed), outcome(DefaultRecordBatch, changed)
            raw = any(isinstance(h, tuple) and isinstance(h[0], RawName) for r in found for h in r)
            assert found == wanted or (raw and wanted == "broken"), (at, other)
            kinds.add("raw" if raw else "broken" if found == "broken" else "read")
    assert kinds == {"raw", "broken", "read"}


def test_the_end_of_a_transaction_is_told() -> None:
    builder = MemoryRecordsBuilder(magic=2, compression_type=0, batch_size=1 << 20)
    builder.append(9, struct.pack(">hh", 0, 1), b"", [])
    builder.close()
    data = bytearray(builder.buffer())
    data[22] |= 0x30  # of a transaction, and its end
    (record,) = memory_records.DefaultRecordBatch(memoryview(data))
    assert isinstance(record, ControlRecord) and record.commit and not record.abort


@CODECS
def test_a_record_that_is_too_large_keeps_all_but_its_value(kind: int) -> None:
    found = read(batch(kind, b"before", b" " * (RECORD + 1), b"after"))
    assert [record.offset for record in found] == [FIRST, FIRST + 1, FIRST + 2]
    assert [found[0].value, found[2].value] == [b"before", b"after"]
    assert (found[1].key, found[1].headers, found[1].timestamp) == (b"k", [("h", b"1")], 7)
    omitted = found[1].value
    assert isinstance(omitted, Omitted)
    assert (omitted.missing, omitted.reason, omitted.first) == ("value", Reason.TOO_LARGE, None)
    assert omitted.size > RECORD
    assert f"allowed are {RECORD}" in omitted.detail


@CODECS
def test_a_key_or_headers_that_are_too_large_are_left_out_with_it(kind: int) -> None:
    (record,) = read(batch(kind, b"v", key=b"k" * RECORD))
    assert (record.key, record.value.missing, len(record.headers)) == (None, "value key", 1)
    (record,) = read(batch(kind, b"v", header=b"1" * RECORD))
    assert (record.key, record.value.missing, record.headers) == (b"k", "value headers", [])
    (record,) = read(batch(kind, None, key=b"k" * (RECORD // 2)))
    assert (len(record.key), record.value) == (RECORD // 2, None)


@CODECS
def test_more_headers_than_allowed_are_left_out(kind: int) -> None:
    found = read(batch(kind, b"v", headers=HEADERS))
    assert [(record.value, len(record.headers)) for record in found] == [(b"v", HEADERS)]
    for values in ([b"v", None, b""], [b" " * (RECORD + 1)]):
        found = read(batch(kind, *values, headers=HEADERS + 1))
        assert [record.offset for record in found] == [FIRST + n for n in range(len(values))]
        for record in found:
            assert (record.key, record.headers, record.timestamp) == (b"k", [], 7)
            assert (record.value.missing, record.value.reason) == (
                "value headers",
                Reason.TOO_LARGE,
            )
        if len(values[0] or b"") < RECORD:
            assert found[0].value.detail == f"{HEADERS + 1} headers, allowed are {HEADERS}"


@CODECS
def test_no_header_of_too_many_is_made(kind: int) -> None:
    """Each is four bytes, and would be some two hundred."""
    many = RECORD // 4 - 10
    data = batch(kind, b"v", header=b"", headers=many)
    read(batch(kind, b"v"))  # what a codec keeps is not counted
    tracemalloc.start()
    try:
        (record,) = read(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert record.value.detail == f"{many} headers, allowed are {HEADERS}"
    assert peak < 10 * RECORD


@COMPRESSED
def test_behind_the_bound_of_a_batch_one_stands_for_all(kind: int) -> None:
    values = [b"first", *[b" " * (RECORD // 2)] * 40]
    found = read(batch(kind, *values))
    assert 10 < len(found) < len(values)
    last = found.pop()
    assert [record.offset for record in found] == [FIRST + n for n in range(len(found))]
    assert last.offset == FIRST + len(values) - 1
    assert (last.key, last.headers) == (None, [])
    assert last.value.first == FIRST + len(found)
    assert (last.value.missing, last.value.reason) == ("key value headers", Reason.TOO_LARGE)


@COMPRESSED
def test_a_hundred_megabytes_are_not_held(kind: int) -> None:
    data = batch(kind, b"first", b" " * 100_000_000, b"never reached")
    tracemalloc.start()
    try:
        first, rest = read(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert first.value == b"first"
    assert (rest.value.first, rest.offset) == (FIRST + 1, FIRST + 2)
    assert peak < 3 * len(data) + 10 * RECORD


def test_members_of_gzip_are_one() -> None:
    data = batch(GZIP, b"a" * 5_000, b"b" * 5_000)
    plain = gzip.decompress(data[HEADER:])
    for cut in (1, 5_003, len(plain) - 1):
        body = gzip.compress(plain[:cut]) + gzip.compress(plain[cut:])
        assert [record.value[:1] for record in read(repacked(data, body))] == [b"a", b"b"]


def broken() -> Iterator[Any]:
    """Compressed records of which only the first can be read, or none."""
    data = batch(GZIP, b"first", bytes(range(256)) * 300, b"last")
    body, plain = data[HEADER:], gzip.decompress(data[HEADER:])
    at = plain.index(b"first") + len(b"first") + 5  # the header of the first; the second follows
    yield pytest.param(repacked(data, body[: len(body) // 2]), id="cut off")
    yield pytest.param(repacked(data, b"no gzip"), id="other bytes")
    yield pytest.param(repacked(data, gzip.compress(plain[:-9])), id="too few records")
    yield pytest.param(repacked(data, gzip.compress(plain[:at] + b"\x01" * 50)), id="negative")
    yield pytest.param(repacked(data, gzip.compress(plain[:at] + b"\xff" * 50)), id="endless")
    yield pytest.param(repacked(data, gzip.compress(plain[:at] + b"\x10" * 50)), id="nonsense")


@pytest.mark.parametrize("data", list(broken()))
def test_what_cannot_be_inflated_is_one_record_that_says_so(data: bytes) -> None:
    *found, last = read(data)
    assert last.offset == FIRST + 2
    assert last.value.reason is Reason.BAD_MESSAGE
    assert last.value.first == FIRST + len(found)


def test_a_codec_that_is_not_there_is_no_fault_of_the_event(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = bytearray(batch(GZIP, b"v" * 100))
    data[22] = LZ4
    struct.pack_into(">I", data, 17, calc_crc32c(memoryview(data)[21:]))
    monkeypatch.setattr(codec, "lz4", None)
    monkeypatch.setattr(codec, "lz4f", None)
    monkeypatch.setattr(codec, "lz4framed", None)
    with pytest.raises(UnsupportedCodecError):
        read(bytes(data))


def test_a_record_that_ends_behind_its_batch_stays_an_error() -> None:
    data = batch(NONE, b" " * (RECORD + 1))[:-1]
    with pytest.raises(CorruptRecordError):
        read(repacked(data, data[HEADER:]))


def test_a_record_of_negative_size_stays_an_error() -> None:
    """Although it has more headers than are read."""
    data = bytearray(batch(NONE, b"v", headers=HEADERS + 1))
    assert data[HEADER] & 0x80 and data[HEADER + 1] < 0x80  # its size takes two bytes
    data[HEADER] |= 1  # the sign
    with pytest.raises(CorruptRecordError):
        list(memory_records.DefaultRecordBatch(memoryview(data)))


def test_a_large_record_that_cannot_be_read_stays_an_error() -> None:
    data = batch(NONE, b" " * (RECORD + 1))
    key = HEADER + 6  # behind its size, how it may be read, when and where it was written
    endless = data[HEADER:key] + b"\xfe\xff\xff\xff\x0f" + data[key + 5 :]
    with pytest.raises(CorruptRecordError):
        read(repacked(data, endless))


def test_kafka_python_still_needs_this(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once this fails, `worker.inflating` may be able to go."""
    monkeypatch.setattr(memory_records, "DefaultRecordBatch", DefaultRecordBatch)
    tracemalloc.start()
    try:
        (record,) = read(batch(GZIP, b" " * 10_000_000))
        del record
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak > 20_000_000
