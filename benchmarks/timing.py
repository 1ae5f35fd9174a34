"""CPU time of one thread: what a busy machine does beside it does not count."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def cpu_s(work: Callable[[], object], repeats: int = 1) -> float:
    """Return the median over ``repeats`` of this thread's CPU seconds for one call of ``work``."""
    times = []
    for _ in range(repeats):
        began = time.thread_time()
        work()
        times.append(time.thread_time() - began)
    return statistics.median(times)
