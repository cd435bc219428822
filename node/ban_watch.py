"""The owner's bans at work: who is banned is hung up on at once, on both planes, and this peer is told of its own ban.

A peer that is banned itself, by a decree that its own ledger has, goes on trying each BANNED_RETRY_S: whoever knows
that the ban is lifted looks for it, too. A mere word of another peer changes nothing here.

That nothing more is taken of a banned peer, and no link or connection of it stays, is node.intake's: it asks the ledger
each time. Here stands what a change brings.

Invariant: a ban that the ledger holds ends the peer's connections within PERIOD_S.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from shoal.crdt.standing import Ban, Standing
from shoal.node.reminders import Reminders
from shoal.protocol.errors import Refusal
from shoal.protocol.identity import PeerId, format_peer_id

PERIOD_S = 1.0
BANNED_RETRY_S = 60.0  # from one try of a banned peer to the next: a dial of one peer, a catch-up


@dataclass(frozen=True, slots=True, kw_only=True)
class BanPorts:
    """`end` is called once for every new ban of another peer, with the owner's reason, and `lifted` when it is over;
    `tell` has what a person must know of this peer's own ban, and whether it is banned now."""

    end: Callable[[PeerId, str], None]
    lifted: Callable[[PeerId], None]
    tell: Callable[[str, bool], None]


def find_ban(standing: Standing, peer: PeerId) -> Ban | None:
    """The first of the bans of this peer that hold."""
    return next((ban for ban in standing.bans if ban.peer == peer), None)


def tell_own_ban(ban: Ban) -> str:
    """What a peer that is banned says of itself, with the next step."""
    why = f" ({ban.reason})" if ban.reason else ""
    by = f"by decree {ban.entry.hex()[:16]}{why}"
    step = f"ask the owner for `shoal swarm unban {format_peer_id(PeerId(ban.peer))}`"
    return f"{Refusal.BANNED}: the swarm's owner has banned this peer {by}; {step}"


class BannedTries:
    """What a banned peer tries again, and how rarely. Time is an argument, in seconds, monotonic."""

    def __init__(self, me: PeerId, standing: Standing) -> None:
        self._me = me
        self._standing = standing
        self._tried: Reminders[str] = Reminders(every_s=BANNED_RETRY_S)

    def may_try(self, what: str, now_s: float) -> bool:
        """Whether this is due; always, unless this peer is banned."""
        return self._me not in self._standing.banned or self._tried.take(what, now_s) is not None


class BanWatch:
    """Looks at what the ledger says, and calls its ports for what is new."""

    def __init__(self, me: PeerId, standing: Standing, ports: BanPorts) -> None:
        self._me = me
        self._standing = standing
        self._ports = ports
        self._known: frozenset[bytes] = frozenset()

    async def watch(self) -> None:
        """Look again and again."""
        while True:
            self.look()
            await asyncio.sleep(PERIOD_S)

    def look(self) -> None:
        """Tell of what has changed since the last look."""
        banned = self._standing.banned
        fresh, over, self._known = banned - self._known, self._known - banned, banned
        for peer in sorted(over):
            if peer == self._me:
                self._ports.tell(
                    f"the swarm's owner has lifted the ban of this peer: it is no more {Refusal.BANNED}", False
                )
            else:
                self._ports.lifted(PeerId(peer))
        for ban in self._standing.bans if fresh else ():
            if ban.peer not in fresh:
                continue
            if ban.peer == self._me:
                self._ports.tell(f"{tell_own_ban(ban)}; it tries again every {BANNED_RETRY_S:.0f} s", True)
            else:
                self._ports.end(PeerId(ban.peer), ban.reason)
            fresh -= {ban.peer}
