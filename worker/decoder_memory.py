"""Memory that a decoder process shares with the worker: encoded images in, pixels out.

Owns the file behind it and where in it what lies. Both sides count images, so the number of one
says which slot it has. Knows nothing of what is in a slot or of whose turn it is. A pipe would
carry 150 kB an image instead, page by page, through the kernel and back.
"""

import fcntl
import mmap
import os
import tempfile

SLOTS = 4  # images a child holds, the one it works on included
MOST_REFUSAL_BYTES = 4096

_KEPT_BYTES = 1024 * 1024  # of a slot; what a larger image took is given back


class DecoderMemory:
    """`SLOTS` places for an image of `max_bytes` and as many for an answer, in an `open_memory`.

    An answer is `size` x `size` x 3 samples or the text of a refusal. What was never written takes
    no memory. Raises OSError where it cannot be had.
    """

    def __init__(self, descriptor: int, size: int, max_bytes: int) -> None:
        self._answer_bytes, self._image_bytes = _slot_bytes(size, max_bytes)
        self._memory = mmap.mmap(descriptor, 0)  # all of it

    def put_image(self, number: int, data: bytes) -> None:
        """Write the `number`-th image since the start."""
        start = self._image(number)
        self._memory[start : start + len(data)] = data

    def image(self, number: int, length: int) -> bytes:
        """A copy of it."""
        start = self._image(number)
        return self._memory[start : start + length]

    def drop_image(self, number: int, length: int) -> None:
        """Give back what a large one took; it is not looked at again."""
        if length > _KEPT_BYTES and hasattr(mmap, "MADV_REMOVE"):
            self._memory.madvise(mmap.MADV_REMOVE, self._image(number), _whole_pages(length))

    def put_answer(self, number: int, body: bytes | memoryview) -> None:
        """Write the answer to the `number`-th image."""
        start = self._answer(number)
        self._memory[start : start + len(body)] = body

    def answer(self, number: int, length: int) -> bytearray:
        """A copy of it."""
        start = self._answer(number)
        with memoryview(self._memory) as whole:
            return bytearray(whole[start : start + length])

    def close(self) -> None:
        """Give it back."""
        self._memory.close()

    def _answer(self, number: int) -> int:
        return number % SLOTS * self._answer_bytes

    def _image(self, number: int) -> int:
        return SLOTS * self._answer_bytes + number % SLOTS * self._image_bytes


def open_memory(size: int, max_bytes: int) -> int:
    """A descriptor of the file without a name that both sides map. Raises OSError.

    On Linux its length is sealed: a codec that is taken over cannot make it shorter, and the
    worker would die of reading where nothing is (memfd_create(2)).
    """
    length = SLOTS * sum(_slot_bytes(size, max_bytes))
    if not hasattr(os, "memfd_create"):
        with tempfile.TemporaryFile() as file:
            file.truncate(length)
            return os.dup(file.fileno())
    descriptor = os.memfd_create("decoder", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, length)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    except OSError:
        os.close(descriptor)  # it is tried again and again
        raise
    return descriptor


def _slot_bytes(size: int, max_bytes: int) -> tuple[int, int]:
    """Of an answer, and of an image."""
    return _whole_pages(max(size * size * 3, MOST_REFUSAL_BYTES)), _whole_pages(max_bytes)


def _whole_pages(length: int) -> int:
    return -(-length // mmap.PAGESIZE) * mmap.PAGESIZE
