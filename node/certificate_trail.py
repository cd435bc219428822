"""What stays of a log whose old certificates are dropped: the trail from the manifest to those that are kept.

Whoever joins later walks it by the rule in `protocol.trail`, and so needs no more trust than who saw every round. The
certificates of the last CERTIFICATES_KEPT rounds stay as they are, as many as two logs that part are compared over
(node.parting), and so do all that something else on this disk still needs.

Invariants: nothing is dropped before the trail over it is durable, in the same transaction; a log over which no trail
leads, as one with rows that a damaged file has lost, is left as it is; a trail with a gap is shown to nobody, and is
fetched again from others (node.log_repair).

Everything here blocks.
"""

import logging
from collections.abc import Iterator, Sequence

from shoal.node.ledger_store import LedgerStore, StoredCertificate
from shoal.protocol.messages import Certificate, Checkpoint
from shoal.protocol.quorum import Authority
from shoal.protocol.trail import (
    Anchor,
    Candidate,
    anchor_of,
    check_trail,
    choose_trail,
    is_connected,
    make_candidate,
)
from shoal.protocol.wire import DELTA_BYTES_MAX, decode_record_untrusted, encode_record

CERTIFICATES_KEPT = 4096
ROUNDS_READ_AT_ONCE = 64
CHECKPOINTS_READ_AT_ONCE = 64

log = logging.getLogger(__name__)


class CertificateTrail:
    """The trail of one store. Each call may raise StoreError."""

    def __init__(self, store: LedgerStore, genesis: Anchor, authority: Authority) -> None:
        self._store = store
        self.genesis = genesis
        self._authority = authority
        self.is_whole = True

    def examine(self) -> Anchor | None:
        """Where the checkpoints lead by their rounds and signers: they were checked before they were stored. None, and
        it is not whole, where some are missing."""
        end, candidates = self.genesis, list[Candidate]()
        for checkpoint in self.load():
            candidates.append(make_candidate(checkpoint.certificate))
            end = anchor_of(checkpoint.certificate)
        leads = is_connected(self.genesis.voters, candidates, self._authority.rule)
        self.is_whole = leads and (end.round > 0 or self._store.get_first_round() in (None, 1))
        return end if self.is_whole else None

    def mend(self, checkpoints: Sequence[Checkpoint]) -> bool:
        """Take a trail that was checked in place of the own one, of which checkpoints are missing. False, and nothing
        is taken, where it does not lead to the own log."""
        first, end = self._store.get_first_round(), anchor_of(checkpoints[-1].certificate)
        own = self._store.get_certificate(end.round)
        if first is None or own is None or own.result_digest != end.digest:
            return False
        self._store.shorten_log(first, _encode(checkpoints))
        self.is_whole = True
        return True

    def forget(self) -> None:
        """The certificates begin with the first round: no trail is needed."""
        self._store.shorten_log(1, ())
        self.is_whole = True

    def load(self, after: int = 0) -> Iterator[Checkpoint]:
        """The checkpoints of the rounds behind this one, in order."""
        while bodies := self._store.list_checkpoints(after, CHECKPOINTS_READ_AT_ONCE):
            for body in bodies:
                checkpoint = decode_record_untrusted(Checkpoint, body, DELTA_BYTES_MAX)
                yield checkpoint
                after = checkpoint.certificate.result.round

    def check(self) -> Anchor:
        """Where it leads from the manifest; raises ProtocolError where it does not."""
        return check_trail(self.genesis, tuple(self.load()), self._authority)

    def shorten(self, first_kept: int) -> None:
        """Drop the certificates before this round, as far as a trail leads to it."""
        first = self._store.get_first_round()
        if first is None or first_kept <= first:
            return
        kept = [one for one in self.load() if one.certificate.result.round <= first_kept]
        candidates = [make_candidate(one.certificate) for one in kept]
        candidates += self._list_candidates(max(first, candidates[-1].round) if kept else 0, first_kept)
        chosen = choose_trail(self.genesis.voters, candidates, self._authority.rule)
        if chosen is None or candidates[-1].round != first_kept:
            log.warning("no trail leads over the certified rounds to %d: none of them is dropped", first_kept)
            return
        bodies = []
        for index in chosen:
            checkpoint = kept[index] if index < len(kept) else self._make_checkpoint(candidates[index].round)
            bodies.append((candidates[index].round, encode_record(checkpoint)))
        self._store.shorten_log(first_kept, bodies)
        log.info("dropped the certificates of rounds %d to %d; %d stay", first, first_kept - 1, len(bodies))

    def adopt(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Take a trail that was checked in place of the own one and of all certificates before its end."""
        end = checkpoints[-1].certificate
        stored = StoredCertificate(round=end.result.round, result_digest=anchor_of(end).digest, body=encode_record(end))
        self._store.put_certificate(stored)
        self._store.shorten_log(stored.round, _encode(checkpoints))
        self.is_whole = True

    def _list_candidates(self, after: int, last: int) -> Iterator[Candidate]:
        """The rounds behind `after` of which the round before is here, too."""
        before = after
        for start in range(after + 1, last + 1, ROUNDS_READ_AT_ONCE):
            for stored in self._store.list_certificates(start, min(start + ROUNDS_READ_AT_ONCE, last + 1)):
                if stored.round == before + 1:
                    yield make_candidate(_decode(stored))
                before = stored.round

    def _make_checkpoint(self, number: int) -> Checkpoint:
        own, before = self._store.get_certificate(number), self._store.get_certificate(number - 1)
        assert own is not None and (before is not None or number == 1), "a candidate"
        return Checkpoint(
            before=None if before is None else _decode(before).result,
            certificate=_decode(own),
        )


def _encode(checkpoints: Sequence[Checkpoint]) -> list[tuple[int, bytes]]:
    return [(one.certificate.result.round, encode_record(one)) for one in checkpoints]


def _decode(stored: StoredCertificate) -> Certificate:
    # It was checked before it was stored, and its row's checksum when the file was opened.
    return decode_record_untrusted(Certificate, stored.body, DELTA_BYTES_MAX)
