"""Record batches that are small on the wire and large in memory, read within bounds.

Brokers limit the compressed size of a batch alone, and kafka-python inflates one whole before it
reads its first record: a hundred kilobytes of gzip may take a hundred megabytes, and a megabyte all
there is. Owns the way around it: a batch is inflated as far as it is read, record by record. Of a
record beyond the bound, place, key and headers are kept, and its value is never held; what lies
behind the bound of the whole batch, or cannot be inflated, is one record that says so. A header of
four bytes takes two hundred once it is an object, so they are counted before any is read, and where
there are too many the record comes without them.

Knows kafka-python's record format; not what records say.
"""

import io
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from kafka import codec
from kafka.errors import CorruptRecordError, UnsupportedCodecError
from kafka.record import memory_records
from kafka.record.default_records import ControlRecord, DefaultRecord, DefaultRecordBatch
from kafka.record.util import decode_varint, encode_varint

from worker.errors import Reason
from worker.header_names import header_name
from worker.messages import Omitted

IN_BYTES = 8 * 1024  # compressed, given to a codec at once; it copies what it does not take
OUT_BYTES = 64 * 1024  # taken from it at once, for one that gives as much as it is asked for
LONGEST_VARINT = 10
NULL, NO_HEADERS = b"\x01", b"\x00"


class _BeyondBounds(Exception):
    """A batch holds more than may be inflated of it."""


class _Broken(Exception):
    """A batch is not what its codec or its records have to look like."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Most bytes of one record, and of all that are inflated of one batch; most headers of one."""

    record: int
    batch: int
    headers: int = 1_000


class BoundedBatch(DefaultRecordBatch):  # type: ignore[misc]
    """Reads records as kafka-python does, but within bounds."""

    bounds: ClassVar[Bounds]
    _buffer: Any
    _pos: int
    _decompressed: bool
    _stream: "_Stream | None" = None  # of a compressed batch that is being read
    _next_offset: int | None = None

    def __init__(self, buffer: memoryview) -> None:
        super().__init__(buffer[: self.HEADER_STRUCT.size])
        self._buffer = buffer  # it would make a bytearray of it, and copy each part twice

    def _maybe_uncompress(self) -> None:
        if not self._decompressed and self.compression_type != self.CODEC_NONE:
            self._assert_has_codec(self.compression_type)
            data = bytes(self._buffer[self._pos :])
            pieces = _pieces(self.compression_type, data, self.bounds.batch)
            self._stream = _Stream(pieces, self.bounds.batch)
            self._buffer, self._pos = bytearray(), 0
        self._decompressed = True

    def __next__(self) -> Any:
        if self._next_record_index >= self._num_records:
            return super().__next__()  # the end, or an error that says there is more
        try:
            record = super().__next__() if self._stream is None else self._inflated(self._stream)
        except _BeyondBounds:
            detail = f"a batch that inflates to more than {self.bounds.batch} bytes"
            return self._rest(Reason.TOO_LARGE, detail)
        except _Broken as error:
            return self._rest(Reason.BAD_MESSAGE, f"a batch that cannot be inflated: {error}")
        self._next_offset = record.offset + 1
        return record

    def _read_msg(self, *_: Any) -> Any:
        """A record that is in the buffer, less what of it is beyond the bounds.

        kafka-python's own wants the buffer to be a copy of the batch, and cannot count headers
        before it makes them. Raises as that does: ValueError, IndexError, CorruptRecordError.
        """
        whole = self._buffer
        size, start = decode_varint(whole, self._pos)
        if size < 0:
            raise CorruptRecordError(f"a record of {size} bytes")
        record = self._parse(start, size) if size <= self.bounds.record else None
        if record is not None:
            return record
        end = start + size
        if end > len(whole):
            raise CorruptRecordError(f"a record of {size} bytes ends behind its batch")
        try:
            return self._cut(_Stream(iter([memoryview(whole)[start:end]]), size), size)
        except _Broken as error:
            raise CorruptRecordError(str(error)) from error
        finally:
            self._buffer, self._pos = whole, end

    def _parse(self, start: int, size: int) -> Any:
        """The record of `size` bytes at `start`; None where it has more headers than it may.

        https://kafka.apache.org/documentation/#record
        """
        buffer = self._buffer
        _, at = decode_varint(buffer, start)  # attributes, of which there are none yet
        since, at = decode_varint(buffer, at)
        delta, at = decode_varint(buffer, at)
        key, at = _nullable(buffer, at)
        value, at = _nullable(buffer, at)
        count, at = decode_varint(buffer, at)
        if count > self.bounds.headers:
            return None
        if count < 0:
            raise CorruptRecordError(f"a record of {count} headers")
        headers = []
        for _ in range(count):
            name, at = _nullable(buffer, at)
            if name is None:
                raise CorruptRecordError("a header without a name")
            text = header_name(name)
            content, at = _nullable(buffer, at)
            headers.append((text, content))
        if at - start != size:
            raise CorruptRecordError(f"a record of {size} bytes that takes {at - start}")
        self._pos = at
        when = self.first_timestamp + since
        if self.timestamp_type == self.LOG_APPEND_TIME:
            when = self.max_timestamp
        make = ControlRecord if self.is_control_batch else DefaultRecord
        offset = self.base_offset + delta
        return make(size, offset, when, self.timestamp_type, key, value, headers)

    def _inflated(self, stream: "_Stream") -> Any:
        """A record of a compressed batch."""
        size, raw = stream.varint()
        if size > self.bounds.record:
            record = self._cut(stream, size)
        else:
            record = self._read(raw + stream.read(size), self._read_msg)
        self._next_record_index += 1
        return record

    def _read(self, data: bytearray, read: Callable[[], Any]) -> Any:
        self._buffer, self._pos = data, 0
        try:
            return read()
        except (ValueError, IndexError, CorruptRecordError) as error:
            raise _Broken(str(error)) from error
        finally:
            self._buffer, self._pos = bytearray(), 0

    def _cut(self, stream: "_Stream", size: int) -> Any:
        """A record beyond the bounds, without its value, nor a key or headers that are as well."""
        before, most = stream.passed, self.bounds.record // 2
        # How it may be read, when and where it was written.
        body = bytearray().join(stream.varint()[1] for _ in range(3))
        missing = ["value"]
        length, raw = stream.varint()
        if length <= most:
            body += raw + stream.read(max(0, length))
        else:
            stream.skip(length)
            body += NULL
            missing.append("key")
        length, _ = stream.varint()
        stream.skip(max(0, length))
        body += NULL
        count, raw = stream.varint()
        length = size - (stream.passed - before)
        if length <= most and count <= self.bounds.headers:
            body += raw + stream.read(length)
        else:
            stream.skip(length)
            body += NO_HEADERS
            missing.append("headers")
        head = bytearray()
        encode_varint(len(body), head.append)
        record = self._read(head + body, lambda: self._parse(len(head), len(body)))
        detail = f"{size} bytes, allowed are {self.bounds.record}"
        if size <= self.bounds.record:
            detail = f"{count} headers, allowed are {self.bounds.headers}"
        omitted = Omitted(" ".join(missing), Reason.TOO_LARGE, detail, size)
        return self._record(record.offset, record.timestamp, record.key, omitted, record.headers)

    def _rest(self, reason: Reason, detail: str) -> Any:
        """One record, at the last offset, for all that are left of the batch."""
        assert self._stream is not None
        taken, self._stream = self._stream.passed, None
        self._next_record_index = self._num_records
        first = self.base_offset if self._next_offset is None else self._next_offset
        omitted = Omitted("key value headers", reason, detail, taken, first)
        return self._record(max(first, self.last_offset), self.max_timestamp, None, omitted, [])

    def _record(
        self, offset: int, timestamp: int, key: bytes | None, value: Omitted, headers: Any
    ) -> Any:
        return DefaultRecord(0, offset, timestamp, self.timestamp_type, key, value, headers)


class _Stream:
    """Bytes that are made as they are read."""

    def __init__(self, pieces: "Iterator[bytes | memoryview]", most: int) -> None:
        """Raises _BeyondBounds once more than `most` bytes were asked for."""
        self._pieces = pieces
        self._most = most
        self._held = bytearray()
        self._made = 0

    @property
    def passed(self) -> int:
        """Bytes read and skipped."""
        return self._made - len(self._held)

    def read(self, size: int) -> bytearray:
        """The next bytes. Raises _Broken where there are not as many."""
        if size < 0:
            raise _Broken("a negative length")
        while len(self._held) < size:
            self._held += self._piece()
        found = self._held[:size]
        del self._held[:size]
        return found

    def skip(self, size: int) -> None:
        """Read them, and hold none."""
        if size < 0:
            raise _Broken("a negative length")
        while len(self._held) < size:
            size -= len(self._held)
            self._held[:] = self._piece()
        del self._held[:size]

    def varint(self) -> tuple[int, bytearray]:
        """A number, and the bytes it was."""
        raw = bytearray()
        while len(raw) < LONGEST_VARINT:
            raw += self.read(1)
            if raw[-1] < 0x80:
                return decode_varint(raw)[0], raw
        raise _Broken("a number that does not end")

    def _piece(self) -> "bytes | memoryview":
        try:
            piece = next(self._pieces, None)
        except (_BeyondBounds, MemoryError):
            raise
        except Exception as error:  # each codec has its own kinds
            raise _Broken(f"{type(error).__name__}: {error}") from error
        if piece is None:
            raise _Broken("it ends before its last record")
        self._made += len(piece)
        if self._made > self._most:
            raise _BeyondBounds
        return piece


def _nullable(buffer: Any, at: int) -> tuple[bytes | None, int]:
    """Bytes with their length before them, which is negative for none; and where they end."""
    length, at = decode_varint(buffer, at)
    if length < 0:
        return None, at
    end = at + length
    return bytes(buffer[at:end]), end


def _pieces(kind: int, data: bytes, most: int) -> Iterator[bytes]:
    """`data` inflated, in pieces that take little memory."""
    if kind == BoundedBatch.CODEC_GZIP:
        return _gunzip(data)
    if kind == BoundedBatch.CODEC_ZSTD:
        return _unzstd(data)
    if kind == BoundedBatch.CODEC_SNAPPY:
        return _unsnappy(data, most)
    if codec.lz4 is None:
        raise UnsupportedCodecError("of the packages for lz4, only the one named so is supported")
    return _unlz4(data)


def _gunzip(data: bytes) -> Iterator[bytes]:
    inflater = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    for start in range(0, len(data), IN_BYTES):
        rest = data[start : start + IN_BYTES]
        while rest:
            if inflater.eof:  # one more member may follow
                inflater = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
            yield inflater.decompress(rest, OUT_BYTES)
            rest = inflater.unconsumed_tail or inflater.unused_data
    while not inflater.eof and (piece := inflater.decompress(b"", OUT_BYTES)):
        yield piece


def _unlz4(data: bytes) -> Iterator[bytes]:
    inflater = codec.lz4.LZ4FrameDecompressor()
    for start in range(0, len(data), IN_BYTES):
        yield inflater.decompress(data[start : start + IN_BYTES], OUT_BYTES)
        while not inflater.needs_input and not inflater.eof:
            yield inflater.decompress(b"", OUT_BYTES)
        if inflater.eof:
            return


def _unzstd(data: bytes) -> Iterator[bytes]:
    source = io.BytesIO(data)
    reader = codec.zstd.ZstdDecompressor().stream_reader(source, read_across_frames=True)
    while piece := reader.read(OUT_BYTES):
        yield piece


def _unsnappy(data: bytes, most: int) -> Iterator[bytes]:
    """A block is inflated whole, so what it says it will be is looked at first."""
    for block in _snappy_blocks(data):
        size = shift = 0
        for byte in block[:LONGEST_VARINT]:
            size |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        if size > most:
            raise _BeyondBounds
        yield codec.snappy.decompress(block)


def _snappy_blocks(data: bytes) -> Iterator[bytes]:
    if not codec._detect_xerial_stream(data):
        yield data
        return
    at = 16
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 4 + size]
        at += 4 + size


def bound(bounds: Bounds) -> None:
    """Let every consumer of this process read batches within `bounds` from now on."""
    memory_records.DefaultRecordBatch = type("BoundedBatch", (BoundedBatch,), {"bounds": bounds})
