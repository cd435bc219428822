"""What `shoal ledger verify` looks at: whether what a disk holds proves itself, without believing the disk.

Each check names what holds, what does not, and what cannot be told because it is not here. A ledger holds when none of
its checks fails.
"""

from collections.abc import Iterator

from shoal.crdt.entries import NO_ENTRY, decode_batch_untrusted, encode_batch, verify_batch
from shoal.crdt.eras import PERMANENT_ERA
from shoal.crdt.ledger import Ledger
from shoal.node.audit import Check, Finding
from shoal.node.ledger_sync import make_rules
from shoal.node.ledger_view import LedgerSource, LedgerView, Tell, list_entries
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import Identity, format_peer_id
from shoal.protocol.messages import digest_record
from shoal.protocol.quorum import Authority, check_votes
from shoal.protocol.trail import Anchor, check_trail

NAMED_MAX = 5  # so many of those that fail are named


def audit_ledger(view: LedgerView, progress: Tell) -> Iterator[Check]:
    """Every check, the cheap ones first where they do not depend on others."""
    yield _check_signatures(view, progress)
    yield _check_ancestors(view)
    yield _check_acceptance(view, progress)
    yield _check_chain(view, progress)
    yield _check_agreement(view)
    yield _check_authors(view)


def _conclude(name: str, failed: list[str], held: str) -> Check:
    if not failed:
        return Check(name=name, finding=Finding.HOLDS, detail=held)
    more = f" and {len(failed) - NAMED_MAX} more" if len(failed) > NAMED_MAX else ""
    return Check(name=name, finding=Finding.FAILS, detail="; ".join(failed[:NAMED_MAX]) + more)


def _check_signatures(view: LedgerView, progress: Tell) -> Check:
    failed = []
    for number, batch in enumerate(view.batches, 1):
        try:
            verify_batch(batch)
        except ProtocolError as error:
            first = batch.entries[0]
            failed.append(f"entry {first.seq} of era {first.era} of {format_peer_id(batch.author)}: {error.detail}")
        progress(f"checking signatures: {number:,} of {len(view.batches):,}")
    return _conclude("signatures", failed, f"{len(view.batches):,} batches are signed by their authors")


def _check_ancestors(view: LedgerView) -> Check:
    """That no entry names one that is not here. Of eras that were dropped nothing need be here."""
    entries = dict(list_entries(view))
    oldest = min((entry.era for entry in entries.values() if entry.era != PERMANENT_ERA), default=0)
    missing = []
    for entry in entries.values():
        named = {entry.prev, *entry.deps} - {NO_ENTRY}
        if not named <= entries.keys() and entry_is_kept(view, entry.era):
            author = format_peer_id(entry.author)
            missing.append(f"entry {entry.seq} of era {entry.era} of {author} names entries that are not here")
    if missing:
        detail = f"{len(missing)} entries wait for others, such as: {missing[0]}; they come by reconciliation"
        return Check(name="ancestors", finding=Finding.UNKNOWN, detail=detail)
    return Check(
        name="ancestors",
        finding=Finding.HOLDS,
        detail=f"{len(entries):,} entries name only each other" + (f", from era {oldest} on" if oldest > 1 else ""),
    )


def entry_is_kept(view: LedgerView, era: int) -> bool:
    """Whether entries of this era still count; of older ones only proofs of equivocation are kept."""
    return era == PERMANENT_ERA or era >= view.state.verdicts.era - 1


def _check_acceptance(view: LedgerView, progress: Tell) -> Check:
    """That a replica which hears of these entries from a stranger comes to the same state."""
    source = view.source
    fresh = Ledger(identity=Identity(bytes(31) + b"\x01"), rules=make_rules(source.manifest, source.swarm))
    base = source.base()
    if base is not None:
        fresh.settle(base)
    failed = []
    for number, batch in enumerate(view.batches, 1):
        try:
            fresh.accept(decode_batch_untrusted(encode_batch(batch)))
        except ProtocolError as error:
            first = batch.entries[0]
            failed.append(f"entry {first.seq} of era {first.era} of {format_peer_id(batch.author)}: {error}")
        progress(f"entering everything anew: {number:,} of {len(view.batches):,}")
    return _conclude("acceptance", failed, "any replica accepts every entry")


def _check_chain(view: LedgerView, progress: Tell) -> Check:
    """That each certificate follows the one before it, decided by a quorum of the voters who are named there; over the
    rounds whose certificates are dropped a trail must lead."""
    source = view.source
    authority = source.manifest.authority(source.swarm)
    try:
        anchor, checkpoints = _walk_trail(source, authority, progress)
    except ProtocolError as error:
        return _conclude("certificates", [f"the trail over dropped rounds: {error}"], "")
    previous, voters, expected = anchor.digest, anchor.voters, anchor.round + 1
    failed, gaps = [], []
    for number in range(expected, source.certificates.newest + 1):
        progress(f"checking certificates: {number:,} of {source.certificates.newest:,}")
        try:
            certificate = source.certificates.get(number)
            if certificate is None:
                continue
            result = certificate.result
            if expected == number:
                if result.previous != previous:
                    failed.append(f"round {number} does not follow round {number - 1}")
                check_votes(certificate, voters, authority)
            else:
                gaps.append(f"{expected} to {number - 1}")
        except ProtocolError as error:
            failed.append(f"round {number}: {error}")
            continue
        previous, voters, expected = digest_record(result), result.voters, number + 1
    if gaps and not failed:
        detail = f"rounds {', '.join(gaps[:NAMED_MAX])} are not here, so what follows them is not proven by this disk"
        return Check(name="certificates", finding=Finding.UNKNOWN, detail=detail)
    over = f"; {checkpoints} checkpoints lead over those before round {anchor.round}" if checkpoints else ""
    held = f"{source.certificates.newest:,} rounds, each decided by the voters of the one before{over}"
    return _conclude("certificates", failed, held)


def _walk_trail(source: LedgerSource, authority: Authority, progress: Tell) -> tuple[Anchor, int]:
    """Where the kept certificates begin, and how many checkpoints lead there; raises ProtocolError where none do."""
    anchor = Anchor(round=0, digest=source.swarm, voters=source.manifest.founders)
    if source.certificates.oldest <= 1:
        return anchor, 0
    progress("checking the trail")
    checkpoints = source.certificates.list_checkpoints()
    anchor = check_trail(anchor, checkpoints, authority)
    own = source.certificates.get(anchor.round)
    if own is not None and digest_record(own.result) != anchor.digest:
        raise ProtocolError(Refusal.WRONG_DIGEST, f"it leads to another round {anchor.round} than is kept")
    return anchor, len(checkpoints)


def _check_agreement(view: LedgerView) -> Check:
    """That the certificates which count by the entries are those that this peer has applied."""
    failed = []
    head = view.state.verdicts.head
    if 0 < head.round <= view.source.certificates.newest:
        applied = view.source.certificates.get(head.round)
        if applied is not None and digest_record(applied.result) != head.digest:
            failed.append(f"round {head.round} has another result by the entries than in this peer's own log")
    if view.state.verdicts.contradiction is not None:
        failed.append(f"round {view.state.verdicts.contradiction} is certified with two results")
    return _conclude("agreement", failed, "the entries and this peer's own log name the same results")


def _check_authors(view: LedgerView) -> Check:
    """Equivocation is no fault of this disk; it is told."""
    if not view.state.excluded:
        return Check(name="authors", finding=Finding.HOLDS, detail="nobody has signed two entries for one slot")
    named = ", ".join(format_peer_id(author) for author in sorted(view.state.excluded)[:NAMED_MAX])
    detail = f"{len(view.state.excluded)} equivocated and are excluded, with proof: {named}"
    return Check(name="authors", finding=Finding.HOLDS, detail=detail)
