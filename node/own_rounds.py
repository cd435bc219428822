"""Which of the certified rounds was the newest one that counted this peer: what it declares of its attendance follows
from that (protocol.attendance), also after a restart, as the certificates are on the disk.

Invariant: only what the log on this disk says without a gap is declared. Behind a gap this peer may have been counted
without knowing it, and would declare longer intervals than others expect: it counts as new.
"""

from shoal.node.ledger_store import LedgerStore
from shoal.protocol.attendance import Counted
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import Certificate
from shoal.protocol.quorum import Head, list_counted
from shoal.protocol.wire import DELTA_BYTES_MAX, decode_record_untrusted

SEARCHED_ROUNDS_MAX = 1024  # who was away for longer counts as new


class OwnRounds:
    """Of one peer. What was found is remembered, as long as the log goes on from there."""

    def __init__(self, store: LedgerStore, me: PeerId) -> None:
        self._store = store
        self._me = me
        self._searched: Head | None = None
        self._found: Counted | None = None  # up to there

    def find(self, head: Head) -> Counted | None:
        """The newest round up to `head` that counted this peer. Blocking; raises StoreError."""
        known = self._searched if self._searched is not None and self._follows(self._searched, head) else None
        if known is None:
            self._found = None
        first = max(head.round - SEARCHED_ROUNDS_MAX, 0) if known is None else known.round
        for number in range(head.round, first, -1):
            stored = self._store.get_certificate(number)
            if stored is None:
                self._found = None
                break
            # It was checked before it was stored, and its row's checksum when the file was opened.
            certificate = decode_record_untrusted(Certificate, stored.body, DELTA_BYTES_MAX)
            counted = list_counted(certificate.result).get(self._me)
            if counted is not None:
                self._found = counted
                break
        self._searched = head
        return self._found

    def _follows(self, known: Head, head: Head) -> bool:
        stored = self._store.get_certificate(known.round)
        digest = None if stored is None else stored.result_digest
        return known.round <= head.round and (known.round == 0 or digest == known.digest)
