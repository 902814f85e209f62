"""Header names that are no UTF-8, which kafka-python can neither read nor send.

The protocol calls them strings, but brokers take any bytes and other clients send them. One such
record, from whoever may produce, would stop every worker that comes to it. Owns the way around it:
the bytes travel in a string that gives them back when it is sent. `worker.inflating` puts it in
place.
"""

from typing import Any

from kafka.record.default_records import DefaultRecordBatch


class RawName(str):
    """A name whose bytes are no UTF-8; PEP 383 keeps them in it."""

    __slots__ = ()

    def encode(self, encoding: str = "utf-8", errors: str = "surrogateescape") -> bytes:
        """The bytes it was made of."""
        return super().encode(encoding, errors)


class _Slice(bytes):
    """Bytes that decode to a RawName where they must."""

    def decode(self, encoding: str = "utf-8", errors: str = "surrogateescape") -> str:
        return RawName(super().decode(encoding, errors))


class _Buffer:
    """The part of a buffer's interface that reading a record needs."""

    def __init__(self, buffer: Any) -> None:
        self._buffer = buffer

    def __getitem__(self, at: Any) -> Any:
        found = self._buffer[at]
        return found if isinstance(found, int) else _Slice(found)


class TolerantBatch(DefaultRecordBatch):  # type: ignore[misc]
    """Reads records as kafka-python does, and those it cannot once more, with raw names."""

    _buffer: Any

    def _read_msg(self, *arguments: Any) -> Any:
        try:
            return super()._read_msg(*arguments)
        except UnicodeDecodeError:  # nothing is consumed yet
            buffer, self._buffer = self._buffer, _Buffer(self._buffer)
            try:
                return super()._read_msg(*arguments)
            finally:
                self._buffer = buffer
