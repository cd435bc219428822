"""How long a trainer has reported nothing while there was something to do.

A trainer that compiles is waited for as long as it says, and then as long as any other.

Invariant: at most one timer runs, and none while nothing is asked of the trainer.
"""

import asyncio
from collections.abc import Callable

from shoal.node.training.messages import (
    Begin,
    Command,
    Compiling,
    Evaluate,
    Evaluated,
    Failed,
    Merge,
    Paused,
    Ready,
    Report,
    Sample,
    Sampled,
)


class SilenceWatch:
    """Of one trainer, from its first command on. `on_silence` is called once for each silence of `timeout_s`."""

    def __init__(self, timeout_s: float, on_silence: Callable[[], None]) -> None:
        self._timeout_s = timeout_s
        self._on_silence = on_silence
        self._training = False
        self._round = 0  # that it was last told to train for
        self._asked = False
        self._timer: asyncio.TimerHandle | None = None

    def told(self, command: Command) -> None:
        """The trainer is given this command."""
        if isinstance(command, Begin | Merge):
            self._training = isinstance(command, Begin) or command.begin
            self._round = command.round
        elif isinstance(command, Evaluate | Sample):
            self._asked = True
        if self._timer is None:
            self._await_report()

    def heard(self, report: Report) -> None:
        """The trainer has said this."""
        if isinstance(report, Ready):
            self._training = report.trains_on
        elif isinstance(report, Paused):
            self._training = self._training and report.round != self._round  # it may have crossed what lets it go on
        elif isinstance(report, Evaluated | Sampled | Failed):
            self._asked = False
        self._await_report(report.timeout_s if isinstance(report, Compiling) else 0.0)

    def cancel(self) -> None:
        """The trainer is gone."""
        if self._timer:
            self._timer.cancel()
        self._timer = None

    def _await_report(self, more_s: float = 0.0) -> None:
        self.cancel()
        if self._training or self._asked:
            self._timer = asyncio.get_running_loop().call_later(self._timeout_s + more_s, self._tell)

    def _tell(self) -> None:
        self._timer = None
        self._on_silence()
