"""Peers that were met or heard of, so that a node can rejoin its swarm with no bootstrap peer alive.

A peer is *measured* when a connection to it once succeeded and none has failed since; *failed* when the last attempt
did not succeed; *unmeasured* when it was only heard of. Rank: measured, then unmeasured, then failed.

Invariants: at most PEERS_MAX entries; what others tell never pushes out a measured peer; the order is a function of the
entries alone, not of the order in which they came; decoding raises only ProtocolError.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Annotated

from shoal.dht.addresses import Addresses, parse_address_untrusted
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import PeerId
from shoal.protocol.wire import U16, U63, Bound, decode_record_untrusted, encode_record

PEERS_MAX = 512
BOOK_BYTES_MAX = 2 * 1024 * 1024
RETRY_MIN_S = 30
RETRY_MAX_S = 6 * 3600
# A peer that nobody could reach this often in a row is forgotten.
FAILURES_MAX = 20

_VERSION = 1


class Standing(IntEnum):
    """How far a peer can be counted on, the best first."""

    MEASURED = 0
    UNMEASURED = 1
    FAILED = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownPeer:
    """What is known of one peer. Times are Unix seconds, 0 for never; `failures` counts since the last success."""

    peer: Annotated[PeerId, Bound(32, 32)]
    addresses: Addresses
    heard_s: U63
    success_s: U63 = 0
    failure_s: U63 = 0
    failures: U16 = 0

    @property
    def standing(self) -> Standing:
        if self.failures:
            return Standing.FAILED
        return Standing.MEASURED if self.success_s else Standing.UNMEASURED

    @property
    def retry_at_s(self) -> int:
        """When an attempt is due again: at once, or after a pause that doubles with every failure."""
        if not self.failures:
            return 0
        pause = RETRY_MIN_S << min(self.failures - 1, 16)
        return self.failure_s + min(pause, RETRY_MAX_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class _BookRecord:
    version: U16
    peers: Annotated[tuple[KnownPeer, ...], Bound(0, PEERS_MAX)]


def _rank(known: KnownPeer) -> tuple[int, int, int, int, bytes]:
    # The id ends every tie, so that two books with the same entries always agree.
    return known.standing, known.failures, -known.success_s, -known.heard_s, known.peer


class PeerBook:
    """The known peers of one swarm. The owner stores `encode()` and takes dial targets from `candidates`."""

    def __init__(self, me: PeerId, peers: Iterable[KnownPeer] = ()) -> None:
        self._me = me
        self._peers: dict[PeerId, KnownPeer] = {}
        for known in peers:
            self._keep(known)

    def __len__(self) -> int:
        return len(self._peers)

    def get(self, peer: PeerId) -> KnownPeer | None:
        """What is known of `peer`."""
        return self._peers.get(peer)

    def ranked(self) -> tuple[KnownPeer, ...]:
        """Every entry, the most reliable first."""
        return tuple(sorted(self._peers.values(), key=_rank))

    def candidates(self, now_s: float, count: int, exclude: Iterable[PeerId] = ()) -> tuple[KnownPeer, ...]:
        """Up to `count` peers worth dialling now, the most reliable first; none whose pause after a failure runs."""
        excluded = frozenset(exclude)
        due = (known for known in self.ranked() if known.addresses and known.retry_at_s <= now_s)
        return tuple(known for known in due if known.peer not in excluded)[:count]

    def hear(self, peer: PeerId, addresses: tuple[str, ...], now_s: float) -> None:
        """Somebody named this peer and its addresses. The caller has checked them with `keep_dialable` or a record."""
        known = self._peers.get(peer)
        if known is None:
            self._keep(KnownPeer(peer=peer, addresses=addresses, heard_s=int(now_s)))
            return
        # The addresses that worked stay until others have been tried and have worked. A peer that dialled us has shown
        # none: then what it says of itself is all there is.
        stay = known.standing is Standing.MEASURED and known.addresses
        merged = known.addresses if stay else addresses or known.addresses
        self._keep(replace(known, addresses=merged, heard_s=max(known.heard_s, int(now_s))))

    def note_success(self, peer: PeerId, addresses: tuple[str, ...], now_s: float) -> None:
        """A connection to the peer stands; `addresses` are what it says of itself, and may be empty."""
        known = self._peers.get(peer) or KnownPeer(peer=peer, addresses=(), heard_s=int(now_s))
        fresh = replace(known, addresses=addresses or known.addresses, failures=0)
        self._keep(replace(fresh, success_s=max(known.success_s, int(now_s), 1)))

    def note_failure(self, peer: PeerId, now_s: float) -> None:
        """An attempt to connect failed. Past FAILURES_MAX in a row the peer is forgotten."""
        known = self._peers.get(peer)
        if known is None:
            return
        if known.failures + 1 > FAILURES_MAX:
            del self._peers[peer]
            return
        self._keep(replace(known, failures=known.failures + 1, failure_s=max(known.failure_s, int(now_s))))

    def forget(self, peer: PeerId) -> None:
        """Drop what is known of the peer."""
        self._peers.pop(peer, None)

    def encode(self) -> bytes:
        """The book's canonical bytes, at most BOOK_BYTES_MAX."""
        return encode_record(_BookRecord(version=_VERSION, peers=self.ranked()))

    def _keep(self, known: KnownPeer) -> None:
        if known.peer == self._me:
            return
        self._peers[known.peer] = known
        if len(self._peers) > PEERS_MAX:
            worst = max(self._peers.values(), key=_rank)
            del self._peers[worst.peer]


def decode_peer_book_untrusted(raw: bytes, me: PeerId) -> PeerBook:
    """The book in `raw`; raises ProtocolError when it is damaged. The caller then starts with an empty one."""
    record = decode_record_untrusted(_BookRecord, raw, BOOK_BYTES_MAX)
    if record.version != _VERSION:
        raise ProtocolError(Refusal.WRONG_VERSION, f"peer book of version {record.version}")
    for known in record.peers:
        for text in known.addresses:
            parse_address_untrusted(text, known.peer)
    return PeerBook(me, record.peers)
