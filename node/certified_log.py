"""What this peer's own log of certified rounds has to tell the ledger.

The round core judges certificates as they come and keeps them in the store. The ledger derives the same from its
entries, but it may be behind: a peer that was away by more than an era can take nothing of what others write now until
it is told which rounds were certified meanwhile, and a certificate that nobody entered leaves a gap behind which
nothing counts. After a re-root the log may be another one than the ledger has summed up.

Everything here blocks.
"""

from blake3 import blake3

from shoal.crdt.certified import ChainBase, extend_base
from shoal.crdt.eras import era_of_round, last_settled_round
from shoal.crdt.fold import LedgerState
from shoal.crdt.ledger import Ledger, LedgerRules
from shoal.node.ledger_store import LedgerStore, StoredCertificate
from shoal.protocol.messages import Certificate, digest_record
from shoal.protocol.trail import Anchor, anchor_of
from shoal.protocol.wire import DELTA_BYTES_MAX, decode_record_untrusted

ROUNDS_READ_AT_ONCE = 256
ERAS_HASHED = 4


class CertifiedLog:
    """Reads the store's table of certificates, which the round core has checked. Each call may raise StoreError."""

    def __init__(self, store: LedgerStore, rules: LedgerRules) -> None:
        self._store = store
        self._rules = rules

    def hash_certificates(self, base_round: int) -> frozenset[bytes]:
        """Of the rounds behind this one that the ledger may hold: what identifies a certificate byte for byte."""
        end = base_round + 1 + ERAS_HASHED * self._rules.rounds_per_era
        return frozenset(blake3(one.body).digest() for one in self._store.list_certificates(base_round + 1, end))

    def find_base(self, ledger: Ledger) -> ChainBase | None:
        """The rounds that the ledger is to be settled on; None where it needs no help, or the log has gaps."""
        found = self._find_way(ledger)
        return None if found is None else self._extend(*found)

    def lacks_rounds(self, ledger: Ledger) -> bool:
        """Whether the ledger is to be settled on rounds to which this log does not lead, because it begins behind."""
        found = self._find_way(ledger)
        return found is not None and self._extend(*found) is None

    def get_anchor(self, number: int | None = None) -> Anchor | None:
        """A round of this log, by default the newest; None where its certificate is not here."""
        stored = self._store.get_last_certificate() if number is None else self._store.get_certificate(number)
        return None if stored is None else anchor_of(_decode(stored))

    def _find_way(self, ledger: Ledger) -> tuple[ChainBase, int] | None:
        """From where to which round the ledger is to be led, None where it needs no help."""
        last = self._store.get_last_certificate()
        if last is None:
            return None
        rounds_per_era = self._rules.rounds_per_era
        era = max(ledger.era, era_of_round(last.round, rounds_per_era))
        settled = min(last_settled_round(era, rounds_per_era), last.round // rounds_per_era * rounds_per_era)
        base, is_other = ledger.base, self._is_of_another_log(ledger.base)
        if not is_other and (settled <= base.round or era == ledger.era):
            return None
        return self._rules.begin_chain() if is_other else base, settled

    def list_missing(self, ledger: Ledger, state: LedgerState, count: int) -> tuple[Certificate, ...]:
        """Up to `count` of the certificates behind the newest round that the log and the ledger have in common; those
        that the ledger holds and does not count, as of the lighter of two logs, are not missing."""
        last = self._store.get_last_certificate()
        # A log that is heavier may well be shorter than the one that the ledger follows.
        agreed = min(state.verdicts.head.round, last.round if last is not None else 0)
        while agreed > ledger.base.round:
            stored = self._store.get_certificate(agreed)
            value = state.certificates.get(agreed)
            if stored is None or value is None or stored.result_digest == _digest(value):
                break
            agreed -= 1
        while (stored := self._store.get_certificate(agreed + 1)) and ledger.follows(stored.result_digest):
            agreed += 1
        found = self._store.list_certificates(agreed + 1, agreed + 1 + count)
        consecutive = (one for at, one in enumerate(found) if one.round == agreed + 1 + at)
        return tuple(map(_decode, consecutive))

    def _is_of_another_log(self, base: ChainBase) -> bool:
        stored = self._store.get_certificate(base.round)
        return stored is not None and stored.result_digest != base.digest

    def _extend(self, base: ChainBase, settled: int) -> ChainBase | None:
        for first in range(base.round + 1, settled + 1, ROUNDS_READ_AT_ONCE):
            end = min(first + ROUNDS_READ_AT_ONCE, settled + 1)
            found = tuple(map(_decode, self._store.list_certificates(first, end)))
            if len(found) < end - first or found[0].result.previous != base.digest:
                return None
            base = extend_base(base, found, self._rules.rounds_per_era)
        return base


def _decode(stored: StoredCertificate) -> Certificate:
    # It was checked before it was stored, and its row's checksum when the file was opened.
    return decode_record_untrusted(Certificate, stored.body, DELTA_BYTES_MAX)


def _digest(value: bytes) -> bytes:
    return digest_record(decode_record_untrusted(Certificate, value, DELTA_BYTES_MAX).result)
