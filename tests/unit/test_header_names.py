"""Header names that are no UTF-8 are read, told apart and sent on as they came."""

import pytest
from kafka.errors import CorruptRecordError
from kafka.record import memory_records
from kafka.record.default_records import DefaultRecordBatch
from kafka.record.memory_records import MemoryRecords, MemoryRecordsBuilder

from worker.header_names import RawName
from worker.inflating import BoundedBatch, Bounds, bound


def batch(*names: str, compression: int = 0) -> bytes:
    """A record batch: a record for each name, which is its one header."""
    builder = MemoryRecordsBuilder(magic=2, compression_type=compression, batch_size=1 << 20)
    for name in names:
        builder.append(timestamp=1, key=b"k", value=b"v", headers=[(name, b"1")])
    builder.close()
    return bytes(builder.buffer())


def names(data: bytes) -> list[str]:
    records = MemoryRecords(data)
    return [name for record in records.next_batch() for name, _ in record.headers]


def raw(data: bytes) -> RawName:
    return RawName(data.decode("utf-8", "surrogateescape"))


@pytest.fixture
def tolerant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_records, "DefaultRecordBatch", DefaultRecordBatch)
    bound(Bounds(1 << 20, 1 << 20))
    assert issubclass(memory_records.DefaultRecordBatch, BoundedBatch)


@pytest.mark.usefixtures("tolerant")
@pytest.mark.parametrize("compression", [0, 1])
def test_they_come_back_as_they_went(compression: int) -> None:
    sent = ["plain", "ü", raw(b"\xff\xfe"), raw(b"a\x80b"), "", "last"]
    found = names(batch(*sent, compression=compression))
    assert found == sent
    assert [name.encode() for name in found][2:4] == [b"\xff\xfe", b"a\x80b"]
    assert batch(*found, compression=compression) == batch(*sent, compression=compression)


@pytest.mark.usefixtures("tolerant")
def test_a_broken_record_stays_an_error() -> None:
    data = bytearray(batch(raw(b"\xff\xfe")))
    data[-1] ^= 0x7F  # the number of headers or what follows it
    with pytest.raises(CorruptRecordError):
        names(bytes(data[:-3]) + b"\x00\x40\xff")


def test_kafka_python_still_needs_this(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once this fails, `worker.header_names` can go."""
    monkeypatch.setattr(memory_records, "DefaultRecordBatch", DefaultRecordBatch)
    with pytest.raises(CorruptRecordError):
        names(batch(raw(b"\xff\xfe")))
