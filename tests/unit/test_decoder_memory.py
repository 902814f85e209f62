"""What a decoder process and the worker write into the memory they share, the other one reads."""

import os
import sys
from collections.abc import Iterator

import pytest

from worker.decoder_memory import (
    MOST_REFUSAL_BYTES,
    SLOTS,
    DecoderMemory,
    memory_bytes,
    open_memory,
)

SIZE = 128
MOST = 3 * 1024 * 1024
ANSWER_BYTES = SIZE * SIZE * 3

only_linux = pytest.mark.skipif(sys.platform != "linux", reason="memfd_create(2), MADV_REMOVE")


@pytest.fixture
def shared() -> Iterator[int]:
    descriptor = open_memory(memory_bytes(SIZE, MOST))
    yield descriptor
    os.close(descriptor)


def test_each_slot_keeps_what_was_put_there_whole(shared: int) -> None:
    ours, theirs = DecoderMemory(shared, SIZE, MOST), DecoderMemory(shared, SIZE, MOST)
    images = [bytes([1 + n]) * MOST for n in range(SLOTS)]
    answers = [bytes([101 + n]) * ANSWER_BYTES for n in range(SLOTS)]
    for number, (image, answer) in enumerate(zip(images, answers, strict=True)):
        ours.put_image(number, image)
        theirs.put_answer(number, answer)
    for number in range(SLOTS):
        assert theirs.image(number, MOST) == images[number]
        assert ours.answer(number, ANSWER_BYTES) == answers[number]
    ours.put_image(SLOTS, b"next")  # the first slot again
    assert theirs.image(SLOTS, 4) == b"next"
    assert theirs.image(1, MOST) == images[1]


def test_a_refusal_fits_where_pixels_are_few() -> None:
    descriptor = open_memory(memory_bytes(1, 1))
    memory = DecoderMemory(descriptor, 1, 1)
    for number in range(SLOTS):
        memory.put_answer(number, bytes([number]) * MOST_REFUSAL_BYTES)
        memory.put_image(number, b"x")
    for number in range(SLOTS):
        assert memory.answer(number, MOST_REFUSAL_BYTES) == bytes([number]) * MOST_REFUSAL_BYTES
    os.close(descriptor)


@only_linux
def test_what_a_large_image_took_is_given_back(shared: int) -> None:
    memory = DecoderMemory(shared, SIZE, MOST)
    assert os.fstat(shared).st_blocks == 0  # nothing is taken in advance
    memory.put_image(0, b"x" * MOST)
    memory.put_image(1, b"y" * 1000)
    memory.drop_image(0, MOST)
    memory.drop_image(1, 1000)
    assert 0 < os.fstat(shared).st_blocks * 512 < 64 * 1024
    assert memory.image(1, 1000) == b"y" * 1000  # small ones are written again at once


@only_linux
def test_nobody_can_make_it_shorter(shared: int) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(shared, 4096)
