"""Messages of a round on their way to the round core: what carries many signatures has them checked in a thread first.

The core judges a message in one step, and the largest take it a fifth of a second of signatures, in which the event
loop would stand still. Checked ahead in a thread they cost the core next to nothing (protocol.signatures), and the loop
goes on meanwhile.

Invariants: the messages of one peer reach the core in the order in which they came, those of others do not wait for
them; at most WAITING_MAX messages of a peer wait, HEAVY_MAX of them with many signatures, and what is beyond is dropped
as `limit`; only of voters is anything checked ahead: the core refuses such messages of others unread.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine

from shoal.protocol.errors import Refusal
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import ROUND_MESSAGES
from shoal.protocol.signatures import count_signatures, verify_ahead

AT_ONCE_MAX = 32  # signatures, some 5 ms
WAITING_MAX = 256
HEAVY_MAX = 2  # a proposal and the next one; each may have a megabyte


class Verification:
    """All calls on the event loop."""

    def __init__(
        self,
        swarm: bytes,
        *,
        deliver: Callable[[ROUND_MESSAGES, PeerId], None],
        drop: Callable[[PeerId, Refusal], None],
        spawn: Callable[[Coroutine[object, object, object]], None],
    ) -> None:
        self._swarm = swarm
        self._deliver = deliver
        self._drop = drop
        self._spawn = spawn
        self._waiting: dict[PeerId, deque[ROUND_MESSAGES]] = {}  # with the one that is being checked

    def take(self, message: ROUND_MESSAGES, sender: PeerId, voters: tuple[PeerId, ...]) -> None:
        """Deliver the message, at once or when it is its turn."""
        is_heavy = sender in voters and _is_heavy(message)
        queue = self._waiting.get(sender)
        if queue is None and not is_heavy:
            self._deliver(message, sender)
        elif queue is None:
            self._waiting[sender] = deque([message])
            self._spawn(self._work_off(sender))
        elif len(queue) >= WAITING_MAX or (is_heavy and sum(map(_is_heavy, queue)) >= HEAVY_MAX):
            self._drop(sender, Refusal.LIMIT)
        else:
            queue.append(message)

    async def _work_off(self, sender: PeerId) -> None:
        queue = self._waiting[sender]
        try:
            while queue:
                if _is_heavy(queue[0]):
                    await asyncio.to_thread(verify_ahead, queue[0], sender, self._swarm)
                self._deliver(queue.popleft(), sender)
        finally:
            del self._waiting[sender]


def _is_heavy(message: ROUND_MESSAGES) -> bool:
    return count_signatures(message) > AT_ONCE_MAX
