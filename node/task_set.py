"""What the daemon has under way: a bounded set of tasks, and the one place that catches what nobody expected."""

import asyncio
import logging
from collections.abc import Callable, Coroutine

from shoal.node.control import ControlStopped
from shoal.protocol.errors import ShoalError

TASKS_MAX = 4096

log = logging.getLogger("shoal")


class DaemonFailed(ShoalError):
    """The daemon has come to its end by a mistake of its own."""


class TaskSet:
    """Tasks that belong to the daemon and end with it.

    `give_up` is called once, when something has failed without which the daemon is of no use: a peer that stays in no
    round and trains on is worse than one that whoever looks after it starts again.
    """

    def __init__(self, give_up: Callable[[], None] = lambda: None) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._give_up = give_up
        self.failure = ""  # what gave up, and nothing before that

    def fail(self, what: str) -> None:
        """The daemon cannot go on; what comes first is what is told."""
        if not self.failure:
            self.failure = what
            self._give_up()

    def check(self) -> None:
        """Raises DaemonFailed where something has failed."""
        if self.failure:
            raise DaemonFailed(f"{self.failure}; the log has the trace, please report it, and start the peer again")

    def spawn(self, work: Coroutine[object, object, object], *, vital: bool = False) -> None:
        """Start it; where a defect ends what is vital, the daemon gives up.

        Past TASKS_MAX it is dropped, and that is told: some peer asks for more than can be done.
        """
        if len(self._tasks) >= TASKS_MAX:
            work.close()
            log.error("more than %d things are under way at once: one is dropped", TASKS_MAX)
            return
        task = asyncio.get_running_loop().create_task(self._guard(work, vital))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # A task that is cancelled before its first step has never looked at its work.
        task.add_done_callback(lambda _: work.close())

    async def end(self) -> None:
        """Cancel what is left and wait for it."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _guard(self, work: Coroutine[object, object, object], vital: bool) -> None:
        name = getattr(work, "__qualname__", str(work))
        try:
            await work
        except ControlStopped:
            log.debug("%s ended with the control plane", name)
        except Exception:  # the top of the daemon: a defect must be seen, and everything else goes on
            log.exception("a defect in %s; please report it with this trace", name)
            if vital:
                self.fail(f"a defect has ended {name}")
