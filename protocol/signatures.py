"""Which signatures a message of a round carries, so that whoever is about to judge it can have them checked elsewhere.

A proposal where members may lie brings the plan with its READYs and a word for each part: a thousand signatures, 0.2 s
of one core. To check them here first is never needed: the round core checks each one itself, and what was found good
before is remembered (protocol.identity).

Invariant: nothing is believed because of a check here; one bad signature ends it.
"""

from collections.abc import Iterator
from functools import partial
from typing import Protocol

from shoal.protocol.errors import ProtocolError
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import (
    ROUND_MESSAGES,
    Certified,
    LockCertificate,
    Locked,
    Plan,
    Promise,
    Proposal,
    verify_message,
    verify_ready,
)


class Check(Protocol):
    """Raises ProtocolError unless its signature holds."""

    def __call__(self) -> None: ...


def count_signatures(message: ROUND_MESSAGES) -> int:
    """How many signatures judging this message may take."""
    match message:
        case Plan():
            return 1 + len(message.roster)
        case Proposal():
            evidence = message.evidence
            if evidence is None:
                return 0
            planned = count_signatures(evidence.plan) if evidence.plan else 0
            return planned + len(evidence.done) + (len(evidence.lock.locks) if evidence.lock else 0)
        case Certified():
            return len(message.certificate.votes)
        case Locked():
            return len(message.certificate.locks)
        case Promise():
            return len(message.lock.locks) if message.lock else 0
        case _:
            return 1


def verify_ahead(message: ROUND_MESSAGES, sender: PeerId, swarm: bytes) -> None:
    """Check the signatures of a message that `sender` sent, up to the first one that does not hold. Never raises:
    whoever judges the message finds that one again."""
    try:
        for check in _list_checks(message, sender, swarm):
            check()
    except ProtocolError:
        return


def _list_checks(message: ROUND_MESSAGES, sender: PeerId, swarm: bytes) -> Iterator[Check]:
    match message:
        case Plan():
            yield partial(verify_message, sender, swarm, message)
            for entry in message.roster:
                yield partial(verify_ready, swarm, entry.signed)
        case Proposal(evidence=evidence) if evidence is not None:
            if evidence.lock is not None:
                yield from _list_lock_checks(evidence.lock, swarm)
            elif evidence.plan is not None:
                yield from _list_checks(evidence.plan, sender, swarm)
                roster = evidence.plan.roster
                for owner, done in zip(evidence.plan.owners, evidence.done, strict=False):
                    if owner < len(roster):
                        yield partial(verify_message, roster[owner].signed.peer, swarm, done)
        case Certified():
            for vote in message.certificate.votes:
                yield partial(verify_message, vote.voter, swarm, vote)
        case Locked():
            yield from _list_lock_checks(message.certificate, swarm)
        case Promise(lock=lock) if lock is not None:
            yield from _list_lock_checks(lock, swarm)
        case _:
            return


def _list_lock_checks(certificate: LockCertificate, swarm: bytes) -> Iterator[Check]:
    for lock in certificate.locks:
        yield partial(verify_message, lock.voter, swarm, lock)
