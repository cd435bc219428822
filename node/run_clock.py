"""The round core's clock: the time in which this process ran, in seconds.

A process that was stopped (SIGSTOP, a debugger, a suspended machine whose clock goes on) has heard nobody meanwhile.
What it has not waited for must not count: a voter that saw no quorum when it was stopped would declare the others
gone as soon as it goes on. So a span in which nobody looked at this clock is no time.

Invariant: it never goes back, and is never ahead of the clock below it.
"""

from collections.abc import Callable

PULSE_S = 1.0  # whoever owns a clock looks at it so often
STOPPED_S = 5.0  # an event loop that has not come round for so long did not run


class RunClock:
    """`time` is monotonic."""

    def __init__(self, time: Callable[[], float]) -> None:
        self._time = time
        self._looked_s = time()
        self._stopped_s = 0.0

    def now(self) -> float:
        now_s = self._time()
        if now_s - self._looked_s > STOPPED_S:
            self._stopped_s += now_s - self._looked_s
        self._looked_s = now_s
        return now_s - self._stopped_s

    def find(self, at_s: float) -> float:
        """When the clock below shows what this one shows at `at_s`, if the process runs until then."""
        return at_s + self._stopped_s
