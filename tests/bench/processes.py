"""Processor time and memory of running processes and their children, by thread name.

Reads what the kernel keeps (Linux's /proc, through psutil). Knows nothing of workers.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil

CHILDREN = "decoder processes"
MAIN = "poll, parse, commit"  # the main thread, and kafka-python's that inherits its name


@dataclass(frozen=True)
class Usage:
    """Processor seconds since the processes began, by thread name, and resident bytes now."""

    cpu: Counter[str]
    rss_bytes: int

    @property
    def cpu_seconds(self) -> float:
        """Of all threads and children together."""
        return sum(self.cpu.values())


def usage(pids: Iterable[int]) -> Usage:
    """Usage of processes and everything they started; a process that has ended counts as 0."""
    cpu: Counter[str] = Counter()
    rss = 0
    for pid in pids:
        process = psutil.Process(pid)
        cpu.update(_by_thread(process))
        reaped = process.cpu_times()
        cpu[CHILDREN] += reaped.children_user + reaped.children_system
        rss += process.memory_info().rss
        for child in process.children(recursive=True):
            try:
                times = child.cpu_times()
                cpu[CHILDREN] += times.user + times.system
                rss += child.memory_info().rss
            except psutil.NoSuchProcess:
                continue
    # The kernel counts in hundredths: rounding takes away what adding them as floats left.
    return Usage(Counter({name: round(seconds, 2) for name, seconds in cpu.items()}), rss)


def _by_thread(process: psutil.Process) -> Counter[str]:
    """Threads bear the names the kernel knows; ended ones count as the main one."""
    found: Counter[str] = Counter()
    for thread in process.threads():
        found[_name(process.pid, thread.id)] += thread.user_time + thread.system_time
    times = process.cpu_times()
    found[MAIN] += max(0.0, times.user + times.system - sum(found.values()))
    return found


def _name(pid: int, thread: int) -> str:
    if thread == pid:
        return MAIN
    try:
        name = Path(f"/proc/{pid}/task/{thread}/comm").read_text().strip()
    except FileNotFoundError:
        return MAIN
    return MAIN if name == Path(f"/proc/{pid}/comm").read_text().strip() else name
