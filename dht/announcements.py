"""When to announce this peer in the DHT and when to look for others.

A core without a clock: the owner calls `poll` when `next_deadline` has come, does what it returns (several may run at
once) and reports each outcome. Announcements follow the epochs of `keys`; look-ups are dense while peers are missing,
pause longer and longer while they bring nothing, and are rare once there are enough.

Invariants: while a peer is connected and an intent is not outstanding there is a next deadline (with no peer there is
nobody to ask, and the first one to connect sets one); at most one announcement and one look-up are outstanding; two
attempts of a kind are never closer than their shortest pause.
"""

from dataclasses import dataclass

from shoal.dht.keys import EPOCH_S, epoch_at, lookup_keys, provider_key
from shoal.protocol.identity import PeerId

PEERS_WANTED = 8
REANNOUNCE_S = 20 * 60
ANNOUNCE_RETRY_MIN_S = 5.0
ANNOUNCE_RETRY_MAX_S = 300.0
# Peers turn to a new epoch's key at different moments, so that its storing nodes are not hit by all at once.
EPOCH_SPREAD_S = EPOCH_S / 12
LOOKUP_MIN_S = 10.0
LOOKUP_MAX_S = 300.0
LOOKUP_IDLE_S = 30 * 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Announce:
    """Provide `key`, then call `note_announced`."""

    key: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LookUp:
    """Find the providers of `keys` in this order until enough are found, then call `note_looked_up`."""

    keys: tuple[bytes, ...]


Intent = Announce | LookUp


class AnnouncementSchedule:
    """The schedule of one peer in one swarm. Times are wall-clock seconds."""

    def __init__(self, swarm: bytes, me: PeerId, now_s: float, peers_wanted: int = PEERS_WANTED) -> None:
        self._swarm = swarm
        self._peers_wanted = peers_wanted
        self._spread_s = EPOCH_SPREAD_S * int.from_bytes(me[:4], "big") / 2**32
        self._peers = 0
        # A time is None while its intent is outstanding.
        self._announce_at_s: float | None = now_s
        self._announced_s = now_s - ANNOUNCE_RETRY_MAX_S
        self._announce_pause_s = ANNOUNCE_RETRY_MIN_S
        self._lookup_at_s: float | None = now_s
        self._looked_up_s = now_s - LOOKUP_MAX_S
        self._lookup_pause_s = LOOKUP_MIN_S

    def next_deadline(self) -> float | None:
        """When `poll` has something to say; None while that depends on `note_…` calls alone."""
        due = [at for at in (self._announce_at_s, self._lookup_at_s) if at is not None]
        return min(due, default=None) if self._peers else None

    def poll(self, now_s: float) -> tuple[Intent, ...]:
        """What is due. Each intent must be reported back, whatever came of it."""
        intents: list[Intent] = []
        if not self._peers:
            return ()
        if self._announce_at_s is not None and self._announce_at_s <= now_s:
            self._announce_at_s, self._announced_s = None, now_s
            intents.append(Announce(key=provider_key(self._swarm, epoch_at(now_s))))
        if self._lookup_at_s is not None and self._lookup_at_s <= now_s:
            self._lookup_at_s, self._looked_up_s = None, now_s
            intents.append(LookUp(keys=lookup_keys(self._swarm, now_s)))
        return tuple(intents)

    def note_announced(self, stored: bool, now_s: float) -> None:
        """An announcement ended; `stored` when another node took it."""
        if not stored:
            self._announce_at_s = now_s + self._announce_pause_s
            self._announce_pause_s = min(2 * self._announce_pause_s, ANNOUNCE_RETRY_MAX_S)
            return
        self._announce_pause_s = ANNOUNCE_RETRY_MIN_S
        epoch_end_s = (epoch_at(now_s) + 1) * EPOCH_S
        self._announce_at_s = min(now_s + REANNOUNCE_S, epoch_end_s + self._spread_s)

    def note_looked_up(self, new_peers: int, now_s: float) -> None:
        """A look-up ended and brought this many peers that were not known before."""
        self._lookup_pause_s = LOOKUP_MIN_S if new_peers else min(2 * self._lookup_pause_s, LOOKUP_MAX_S)
        self._lookup_at_s = now_s + self._pause_between_lookups_s()

    def note_addresses(self, now_s: float) -> None:
        """This peer has other addresses than those that it announced."""
        if self._announce_at_s is not None:
            soon_s = max(now_s, self._announced_s + ANNOUNCE_RETRY_MIN_S)
            self._announce_at_s = min(self._announce_at_s, soon_s)

    def note_peers(self, connected: int, now_s: float) -> None:
        """How many peers are connected now; call at every change."""
        met_first = connected > 0 and self._peers == 0
        fell_short = connected < self._peers_wanted <= self._peers
        self._peers = connected
        if met_first and self._announce_at_s is not None:
            self._announce_pause_s = ANNOUNCE_RETRY_MIN_S
            self._announce_at_s = min(self._announce_at_s, max(now_s, self._announced_s + ANNOUNCE_RETRY_MIN_S))
        if met_first or fell_short:
            self._lookup_pause_s = LOOKUP_MIN_S
            if self._lookup_at_s is not None:
                self._lookup_at_s = min(self._lookup_at_s, max(now_s, self._looked_up_s + LOOKUP_MIN_S))

    def _pause_between_lookups_s(self) -> float:
        return LOOKUP_IDLE_S if self._peers >= self._peers_wanted else self._lookup_pause_s
