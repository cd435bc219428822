"""Who hears of entries, and what the opener of a comparison does: the decisions behind `node/ledger_sync.py`.

New entries are pushed to a few peers at once. Everything else is anti-entropy (Demers et al., "Epidemic algorithms for
replicated database maintenance", PODC 1987): in each period a peer compares its ledger with a random live one. While
that finds differences, or fails, it goes on with another one, up to COMPARISONS_MAX. So a swarm at rest pays for one
short comparison a peer and period, and news in a swarm that was cut apart spreads as a rumour does, by a factor of
several in a period.

Invariants: a conversation has at most ROUND_TRIPS_MAX exchanges; what it leaves is left to the next one, which goes on
wherever the sets stand by then. No peer is chosen twice in one period or for one push.
"""

from collections.abc import Callable, Sequence

from shoal.crdt.ledger import Ledger
from shoal.crdt.reconciliation import answer, begin
from shoal.crdt.sketch import SALT_BYTES
from shoal.protocol.identity import PeerId

PERIOD_S = 10.0
PUSH_PEERS = 4
COMPARISONS_MAX = 4
# How long to wait for an answer, each time that a question is asked: whoever answers keeps no state, so asking again
# does no harm. The last one is long enough for an answer of full length over 1 Mbit/s, used half by others.
ANSWER_TIMEOUTS_S = (1.0, 2.0, 4.0)
ROUND_TRIPS_MAX = 8


class PeerChoice:
    """Which peers to turn to. Chance decides: who is chosen by a rule can be cut off by whoever knows the rule.

    `draw_bytes` returns so many random bytes.
    """

    def __init__(self, draw_bytes: Callable[[int], bytes]) -> None:
        self._draw_bytes = draw_bytes

    def choose_for_push(self, live: Sequence[PeerId]) -> tuple[PeerId, ...]:
        """Who is told of new entries at once."""
        return self._choose(live, PUSH_PEERS)

    def choose_for_comparison(self, live: Sequence[PeerId]) -> tuple[PeerId, ...]:
        """With whom to compare in this period, one after the other until one comparison finds no difference."""
        return self._choose(live, COMPARISONS_MAX)

    def draw_salt(self) -> bytes:
        """The salt of one conversation."""
        return self._draw_bytes(SALT_BYTES)

    def _choose(self, live: Sequence[PeerId], count: int) -> tuple[PeerId, ...]:
        left = list(live)
        return tuple(left.pop(int.from_bytes(self._draw_bytes(8), "big") % len(left)) for _ in live[:count])


class Conversation:
    """The opener's side of one comparison: send `request`, take the entries of the reply in, call `go_on`; until
    `request` is None."""

    def __init__(self, ledger: Ledger, salt: bytes) -> None:
        self._ledger = ledger
        self._round_trips = 0
        self.request: bytes | None = begin(ledger, salt)
        self.found_difference = False

    def go_on(self, reply: bytes, batches: int) -> tuple[bytes, ...]:
        """What to push to the other one after its `reply` (empty: it has nothing to add) with so many batches.

        Raises ProtocolError for a reply that no honest peer sends.
        """
        self._round_trips += 1
        self.request = None
        if reply or batches:
            self.found_difference = True
        if not reply:
            return ()
        following = answer(self._ledger, reply)
        if self._round_trips < ROUND_TRIPS_MAX:
            self.request = following.reply
        return following.batches
