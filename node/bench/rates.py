"""How a rate is measured: the same work several times, after one time that is not counted."""

import statistics
import time
from collections.abc import Callable

GB = 1e9


def measure_rate(work: Callable[[], object], nbytes: int, repeats: int, clock: Callable[[], float]) -> float:
    """GB (10^9 bytes) a second by this clock, the median: `time.thread_time` where one core is what counts and others
    may use the machine, `time.perf_counter` where more than this thread works."""
    return nbytes / GB / measure_span(work, repeats, clock)


def measure_span(work: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    """Seconds by this clock, the median, after a first time that does not count."""
    spans = []
    for _ in range(repeats + 1):
        began_s = clock()
        work()
        spans.append(max(clock() - began_s, 1e-9))
    return statistics.median(spans[1:])


def measure_latency(work: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Milliseconds of wall time: the median and the 99th percentile."""
    spans = []
    for _ in range(repeats):
        began_s = time.perf_counter()
        work()
        spans.append(1e3 * (time.perf_counter() - began_s))
    ordered = sorted(spans)
    return statistics.median(ordered), ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
