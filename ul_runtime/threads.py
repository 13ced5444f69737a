"""How many threads compute: as many as cores are free, looked at again as the work goes on.

Threads of one product wait for each other, and spin while they wait: beside a program that keeps one of two cores busy,
two threads train 40 times slower than one (measured). So one thread fewer computes for each core that others use.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

_LOG = logging.getLogger(__name__)
_LOOK_EVERY_S = 1.0
_FREE_FOR_S = 5.0  # before a thread is added
_SPARED = 0.5  # of a core: what others may use before a thread is taken away
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def cores() -> int:
    """Cores that this process may compute on: of its affinity, at most a container's quota and $OMP_NUM_THREADS.

    Two hardware threads of one core count once.
    """
    allowed = _allowed()
    found = len({_siblings(cpu) for cpu in allowed})
    limit = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return max(1, min(found, _quota() or found, int(limit) if limit.isdecimal() and int(limit) else found))


def _allowed() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _siblings(cpu: int) -> str:
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _quota() -> int | None:
    """Whole cores of a container's quota, at least one; None without a quota."""
    try:
        most, period = _QUOTA.read_text().split()
        return max(1, int(most) // int(period))
    except (OSError, ValueError):  # none, or "max"
        return None


def _cpu_seconds_of_others() -> float | None:
    """What other programs have used of this process's cores since some time; None where the system does not say."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return None
    names = {f"cpu{cpu}" for cpu in _allowed()}
    ticks = 0
    for name, *counts in (line.split() for line in lines if line.startswith("cpu")):
        if name in names:
            user, nice, system, _idle, _waiting, interrupts, soft, stolen = map(int, counts[:8])
            ticks += user + nice + system + interrupts + soft + stolen
    return ticks / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])  # of this process and the commands that it ran


class FreeCores:
    """Counts threads: `most`, less one for each core that others use; for any number of callers at once."""

    def __init__(
        self,
        most: int,
        others: Callable[[], float | None] = _cpu_seconds_of_others,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`others`: seconds of a core that other programs have used since some time; `clock` in seconds."""
        self.most = self.count = most
        self._all = max(most, len(_allowed()))  # hardware threads
        self._others, self._clock = others, clock
        self._lock = threading.Lock()
        self._free_s = 0.0
        self._since, self._used = clock(), others()

    def threads(self) -> int:
        """How many threads should compute now."""
        with self._lock:
            now = self._clock()
            if self.most > 1 and now - self._since >= _LOOK_EVERY_S:
                self._look(now)
            return self.count

    def _look(self, now: float) -> None:
        took, before = now - self._since, self._used
        self._since, self._used = now, self._others()
        if before is None or self._used is None:
            return
        busy = (self._used - before) / took
        free = max(1, min(self.most, int(self._all - busy + _SPARED)))
        self._free_s = self._free_s + took if free > self.count else 0.0
        if free < self.count or self._free_s >= _FREE_FOR_S:
            self._free_s, self.count = 0.0, free
            how = f"{free} thread{'s' if free > 1 else ''}"
            _LOG.info("other programs use %.1f of %d cores: %s from here; --threads fixes it", busy, self._all, how)


_FREE = FreeCores(cores())


def free_threads() -> int:
    """As many as cores are free: of all loops in this process without --threads."""
    return _FREE.threads()
