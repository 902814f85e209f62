"""How this process gives memory back to the kernel. Knows nothing of what is in it.

Each answer of Kafka is megabytes long and copied several times. glibc gives blocks of that size
back as soon as they are free, and the kernel fills the next ones with zeros, page by page: more
work than reading them. And it has a heap for nearly every thread, each with free memory of its own.
"""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # mallopt(3)
_HEAPS = 2
_LARGEST_BLOCK = 32 * 1024 * 1024  # taken from a heap: the most that glibc allows
_KEPT_BYTES = 32 * 1024 * 1024  # free at the end of a heap; beyond it, memory is given back


def keep_freed() -> None:
    """Use freed memory again instead of giving it back; without glibc nothing changes.

    To be called before there are threads.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, _HEAPS)
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
