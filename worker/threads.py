"""Names of threads as the operating system shows them: in `top -H`, profilers and the benchmark.

Knows nothing of what the threads do.
"""

import ctypes
import sys
from threading import current_thread

_PR_SET_NAME = 15  # linux/prctl.h; the kernel keeps 15 bytes


def show_name() -> None:
    """Give the calling thread's Python name to the kernel (Python does so itself from 3.14).

    Threads it starts, such as torch's, inherit it.
    """
    if sys.platform == "linux":
        name = current_thread().name.encode()[:15]
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name, 0, 0, 0)
