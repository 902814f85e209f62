"""Header names that are no UTF-8, which kafka-python can neither read nor send.

The protocol calls them strings, but brokers take any bytes and other clients send them. One such
record, from whoever may produce, would stop every worker that comes to it. Owns the way around it:
the bytes travel in a string that gives them back when it is sent. `worker.inflating` reads them.
"""


class RawName(str):
    """A name whose bytes are no UTF-8; PEP 383 keeps them in it."""

    __slots__ = ()

    def encode(self, encoding: str = "utf-8", errors: str = "surrogateescape") -> bytes:
        """The bytes it was made of."""
        return super().encode(encoding, errors)


def header_name(raw: bytes) -> str:
    """The name whose bytes these are; a RawName where they are no UTF-8."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return RawName(raw.decode("utf-8", "surrogateescape"))
