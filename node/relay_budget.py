"""How many bytes this peer still passes on for others: within an hour, in all and for each of them.

No clock in here: time is an argument, in seconds, monotonic.

Invariants: in no hour more than `bytes_max` are spent, and no more than `bytes_per_peer_max` for one peer; at most
PEERS_MAX peers are remembered, and who is forgotten is still within the bound of all.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable

from shoal.protocol.identity import PeerId

PERIOD_S = 3600.0
SLOT_S = 60.0  # what is spent is forgotten in such steps
PEERS_MAX = 1024


class _Spent:
    """The bytes of the last hour, by slots."""

    __slots__ = ("_slots", "_total")

    def __init__(self) -> None:
        self._slots: deque[list[int]] = deque()  # number and bytes, the oldest first
        self._total = 0

    def count(self, now: float) -> int:
        first = int((now - PERIOD_S) // SLOT_S)
        while self._slots and self._slots[0][0] < first:
            self._total -= self._slots.popleft()[1]
        return self._total

    def add(self, nbytes: int, now: float) -> None:
        slot = int(now // SLOT_S)
        if self._slots and self._slots[-1][0] == slot:
            self._slots[-1][1] += nbytes
        else:
            self._slots.append([slot, nbytes])
        self._total += nbytes


class RelayBudget:
    """Every byte counts once in all, and once for each of the two peers between whom it passes."""

    def __init__(self, *, bytes_max: int, bytes_per_peer_max: int) -> None:
        self._bytes_max = bytes_max
        self._bytes_per_peer_max = bytes_per_peer_max
        self._all = _Spent()
        self._by_peer: OrderedDict[PeerId, _Spent] = OrderedDict()

    def left(self, peers: Iterable[PeerId], now: float) -> int:
        """How many more bytes may pass between these; with nobody named, at all."""
        left = self._bytes_max - self._all.count(now)
        for peer in peers:
            spent = self._by_peer.get(peer)
            left = min(left, self._bytes_per_peer_max - (spent.count(now) if spent is not None else 0))
        return max(0, left)

    def spend(self, peers: Iterable[PeerId], nbytes: int, now: float) -> bool:
        """Count bytes that are about to pass between these; False, and nothing is counted, where that is too many."""
        named = tuple(peers)
        if self.left(named, now) < nbytes:
            return False
        self._all.add(nbytes, now)
        for peer in named:
            spent = self._by_peer.setdefault(peer, _Spent())
            self._by_peer.move_to_end(peer)
            spent.count(now)
            spent.add(nbytes, now)
        while len(self._by_peer) > PEERS_MAX:
            self._by_peer.popitem(last=False)
        return True
