"""Payloads that wait for a link: one queue a peer, from which all links to that peer are fed.

A payload is given to a link only when that has next to nothing to send, so that a link which opens later, or is faster,
takes its share of what waits.

Invariants: who came first goes first, and keeps its place until it leaves, however often it is woken in vain; whoever
leaves wakes the next, so that no room is overlooked; at most `waiting_max` wait for one peer.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from shoal.protocol.identity import PeerId


class SendQueues:
    """All calls on the event loop, each in constant time, but for `wake_all`."""

    def __init__(self, waiting_max: int) -> None:
        self._waiting_max = waiting_max
        self._queues: dict[PeerId, OrderedDict[int, asyncio.Event]] = {}

    def is_full(self, peer: PeerId) -> bool:
        """Whether no further payload may wait for this peer."""
        return len(self._queues.get(peer, ())) >= self._waiting_max

    def has_waiting(self, peer: PeerId) -> bool:
        """Whether somebody who came before waits."""
        return peer in self._queues

    @contextmanager
    def line_up(self, peer: PeerId) -> Iterator[asyncio.Event]:
        """A place behind everybody who waits for this peer; for `wait`."""
        place = asyncio.Event()
        queue = self._queues.setdefault(peer, OrderedDict())
        queue[id(place)] = place
        try:
            yield place
        finally:
            del queue[id(place)]
            if not queue:
                del self._queues[peer]
            self.wake(peer)

    async def wait(self, place: asyncio.Event) -> None:
        """Until this place is woken. Whoever is woken looks for room, and waits again where there is none."""
        await place.wait()
        place.clear()

    def wake(self, peer: PeerId) -> None:
        """There may be room for the first, and when that leaves for the next."""
        if queue := self._queues.get(peer):
            next(iter(queue.values())).set()

    def wake_all(self, peer: PeerId) -> None:
        """A link is lost: let everybody see what is left."""
        for place in self._queues.get(peer, {}).values():
            place.set()
