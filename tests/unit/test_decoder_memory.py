"""What a decoder process and the worker write into the memory they share, the other one reads."""

import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from worker.decoder_memory import MOST_REFUSAL_BYTES, SLOTS, DecoderMemory, open_memory

SIZE = 128
MOST = 3 * 1024 * 1024
ANSWER_BYTES = SIZE * SIZE * 3

only_linux = pytest.mark.skipif(sys.platform != "linux", reason="memfd_create(2), MADV_REMOVE")


@pytest.fixture
def shared() -> Iterator[int]:
    descriptor = open_memory(SIZE, MOST)
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
    descriptor = open_memory(1, 1)
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


def test_systems_without_memfd_share_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    descriptor = open_memory(SIZE, MOST)
    ours, theirs = DecoderMemory(descriptor, SIZE, MOST), DecoderMemory(descriptor, SIZE, MOST)
    os.close(descriptor)  # what is mapped stays
    ours.put_image(SLOTS - 1, b"x" * MOST)
    assert theirs.image(SLOTS - 1, MOST) == b"x" * MOST


@only_linux
def test_memory_that_cannot_be_had_leaves_no_descriptor() -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = open_descriptors()
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            open_memory(SIZE, MOST)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert open_descriptors() == before


def open_descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}
