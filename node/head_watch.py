"""Lets tasks wait until the newest applied round moves on, in bounded time."""

import asyncio
import contextlib

from shoal.protocol.rounds import RoundCore

LOOK_S = 0.5


class HeadWatch:
    """`moved` is called whenever a round is applied."""

    def __init__(self, core: RoundCore) -> None:
        self._core = core
        self._moved = asyncio.Event()

    def moved(self) -> None:
        self._moved.set()

    async def wait(self, timeout_s: float) -> None:
        """Return when the head has moved, or after `timeout_s`."""
        self._moved.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._moved.wait()

    async def wait_past(self, number: int, timeout_s: float) -> bool:
        """Wait until a round after `number` is applied; whether it was in time."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while self._core.head.round <= number and loop.time() < deadline:
            await self.wait(LOOK_S)
        return self._core.head.round > number
