"""The owner's bans at work: who is banned is hung up on at once, on both planes, and this peer is told of its own ban.

That nothing more is taken of a banned peer, and no link or connection of it stays, is node.intake's: it asks the ledger
each time. Here stands what a change brings.

Invariant: a ban that the ledger holds ends the peer's connections within PERIOD_S.
"""

import asyncio
import logging
from collections.abc import Callable

from shoal.crdt.standing import Standing
from shoal.protocol.errors import Refusal
from shoal.protocol.identity import PeerId

PERIOD_S = 1.0

log = logging.getLogger("shoal")


class BanWatch:
    """`end` is called once for every new ban of another peer, with the owner's reason."""

    def __init__(self, me: PeerId, standing: Standing, end: Callable[[PeerId, str], None]) -> None:
        self._me = me
        self._standing = standing
        self._end = end
        self._known: frozenset[bytes] = frozenset()

    async def watch(self) -> None:
        """Look again and again."""
        while True:
            self.look()
            await asyncio.sleep(PERIOD_S)

    def look(self) -> None:
        """Tell of what has changed since the last look."""
        banned = self._standing.banned
        fresh, self._known = banned - self._known, banned
        for ban in self._standing.bans if fresh else ():
            if ban.peer not in fresh:
                continue
            if ban.peer == self._me:
                log.error("%s: the swarm's owner has banned this peer (%s)", Refusal.BANNED, ban.reason)
            else:
                self._end(PeerId(ban.peer), ban.reason)
            fresh -= {ban.peer}
