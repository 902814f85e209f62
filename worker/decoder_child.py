"""The program a decoder process runs: images in on stdin, pixels out on stdout, until EOF.

Owns the child's own limits and the wire format it shares with `worker.decoding`. Knows
nothing of queues, deadlines or retries: whoever started it may kill it at any moment.
Run as
`python -m worker.decoder_child DESCRIPTOR SIZE MAX_BYTES MAX_PIXELS MEMORY_BYTES PARENT_PID`.

Wire: the child says `READY` once. A request is the `LENGTH` of an encoded image, which lies in the
memory behind `DESCRIPTOR` (`worker.decoder_memory`); the answer is `ANSWER` (status, length) of a
body that lies there, too: with `PIXELS` the size x size x 3 samples, with `REFUSED` a reason and a
detail, UTF-8, a NUL between them.
"""

import itertools
import logging
import os
import resource
import signal
import struct
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # at run time only after the limits are set
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from worker.decoder_memory import DecoderMemory

READY = b"R"
LENGTH = struct.Struct("<I")
ANSWER = struct.Struct("<BI")
PIXELS, REFUSED = 0, 1

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_NICENESS = 10  # a decoder that runs ahead of the embedding only lengthens the queue before it


def main(argv: list[str]) -> int:
    """Serve until stdin ends."""
    shared, size, max_bytes, max_pixels, memory_bytes, parent = map(int, argv)
    _stay_out_of_the_way(parent)
    _mute_codecs()
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # numpy would reserve memory for every core
    from worker.decoder_memory import DecoderMemory
    from worker.images import ImageLimits, decode

    _limit_pillow(max_pixels)
    memory = DecoderMemory(shared, size, max_bytes)
    _limit_memory(memory_bytes)
    limits = ImageLimits(max_bytes, max_pixels)
    _serve(lambda data: decode(data, size, limits), memory)
    return 0


def _serve(decode: "Callable[[bytes], NDArray[np.uint8]]", memory: "DecoderMemory") -> None:
    """Answer requests in the order they come. An error that is not the image's own ends us."""
    from worker.errors import EventError

    requests, answers = sys.stdin.buffer, sys.stdout.fileno()
    os.write(answers, READY)
    for number in itertools.count():
        if not (head := requests.read(LENGTH.size)):
            return
        data = memory.image(number, *LENGTH.unpack(head))
        try:
            status, body = PIXELS, decode(data).data.cast("B")
        except EventError as error:
            status, body = REFUSED, memoryview(f"{error.reason}\0{error.detail}".encode())
        memory.put_answer(number, body)
        os.write(answers, ANSWER.pack(status, len(body)))


def _stay_out_of_the_way(parent: int) -> None:
    """Die with the parent, leave its signals and the processor to it, and write no core files."""
    os.nice(_NICENESS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def _mute_codecs() -> None:
    """Keep Python's own last words, but not what codecs have to say about strangers' files."""
    logging.disable()
    warnings.simplefilter("ignore")
    sys.stderr = os.fdopen(os.dup(2), "w")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)


def _limit_pillow(max_pixels: int) -> None:
    """Give Pillow's process-wide limit our value: it raises at twice its own."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = (max_pixels + 1) // 2


def _limit_memory(memory_bytes: int) -> None:
    """Cap what images may add to the address space this process needs when idle."""
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        idle = pages * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (idle + memory_bytes,) * 2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
