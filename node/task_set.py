"""What the daemon has under way: a bounded set of tasks, and the one place that catches what nobody expected."""

import asyncio
import logging
from collections.abc import Coroutine

from shoal.node.control import ControlStopped

TASKS_MAX = 4096

log = logging.getLogger("shoal")


class TaskSet:
    """Tasks that belong to the daemon and end with it."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[object, object, object]) -> None:
        """Start it. Past TASKS_MAX it is dropped, and that is told: some peer asks for more than can be done."""
        if len(self._tasks) >= TASKS_MAX:
            work.close()
            log.error("more than %d things are under way at once: one is dropped", TASKS_MAX)
            return
        task = asyncio.get_running_loop().create_task(self._guard(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # A task that is cancelled before its first step has never looked at its work.
        task.add_done_callback(lambda _: work.close())

    async def end(self) -> None:
        """Cancel what is left and wait for it."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _guard(self, work: Coroutine[object, object, object]) -> None:
        name = getattr(work, "__qualname__", str(work))
        try:
            await work
        except ControlStopped:
            log.debug("%s ended with the control plane", name)
        except Exception:  # the top of the daemon: a defect must be seen, and everything else goes on
            log.exception("a defect in %s; please report it with this trace", name)
