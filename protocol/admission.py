"""Who may take part in a swarm: the owner's rule, invitations, and the proof that a peer shows.

    ticket        a key pair that the owner makes: whoever has its seed (it stands in the URI) may use the invitation
    invitation    the owner's word that the ticket's public key lets peers in until a time
    proof         the invitation and the ticket's word for one peer id; a peer shows it in its presence

Anybody who knows the manifest checks a proof alone, with two signatures and no state. A proof counts until the
invitation's expiry by the clock of whoever judges it, CLOCK_SKEW_MAX_S later at the most. Founders, the owner, whoever
the owner has admitted in the ledger and whoever votes need no invitation. A ban of a ticket's public key withdraws the
invitation. Bans of peers are judged elsewhere and beat all of this.

Invariant: a proof is good for the peer, the swarm and the expiry that it was made for, and for no other.
"""

from collections.abc import Set
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

import base58

from shoal.protocol.errors import ProtocolError, UriError
from shoal.protocol.identity import PEER_ID_BYTES, SEED_BYTES, Identity, PeerId, verify_signature
from shoal.protocol.wire import U32, U63, Bound, Bytes64, decode_record_untrusted, encode_record

CLOCK_SKEW_MAX_S = 60.0
TICKET_TEXT_MAX = 256  # characters of an invitation in a URI; base58 takes quadratic time
PROOFS_MAX = 1024


class AdmissionRule(StrEnum):
    """OPEN: everybody. LISTED: whom the owner has admitted. INVITED: those, and whoever shows an invitation."""

    OPEN = "open"
    LISTED = "listed"
    INVITED = "invited"


@dataclass(frozen=True, slots=True, kw_only=True)
class Invitation:
    """The owner's word: this ticket lets peers in until then (Unix seconds)."""

    ticket: Annotated[PeerId, Bound(PEER_ID_BYTES, PEER_ID_BYTES)]
    expires_s: U63
    signature: Bytes64


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionProof:
    """What one peer shows: an invitation, and the ticket's signature over the peer's id."""

    invitation: Invitation
    signature: Bytes64


@dataclass(frozen=True, slots=True, kw_only=True)
class GetDecrees:
    """Asks for the owner's decrees from this one of its chain on: who waits to be admitted may read them, too. They
    come as LedgerEntries."""

    first: U32


@dataclass(frozen=True, slots=True, kw_only=True)
class Ticket:
    """What stands in a URI: the ticket's secret and the owner's signature over the rest of the invitation."""

    seed: Annotated[bytes, Bound(SEED_BYTES, SEED_BYTES)]
    expires_s: U63
    signature: Bytes64

    @property
    def invitation(self) -> Invitation:
        """What may be shown of it."""
        return Invitation(ticket=Identity(self.seed).peer, expires_s=self.expires_s, signature=self.signature)

    def __str__(self) -> str:
        return base58.b58encode(encode_record(self)).decode("ascii")

    def __repr__(self) -> str:
        return f"Ticket(expires_s={self.expires_s})"  # its seed belongs into no log


def issue_ticket(owner: Identity, swarm: bytes, seed: bytes, expires_s: int) -> Ticket:
    """A new invitation. `seed` is fresh entropy."""
    payload = _invited(Identity(seed).peer, expires_s)
    return Ticket(seed=seed, expires_s=expires_s, signature=owner.sign("invitation", swarm, payload))


def parse_ticket(text: str) -> Ticket:
    """Inverse of `str(Ticket)`; raises UriError."""
    fix = "copy the URI whole"
    if len(text) > TICKET_TEXT_MAX:
        raise UriError("invite", f"has {len(text)} characters, at most {TICKET_TEXT_MAX}", fix)
    try:
        return decode_record_untrusted(Ticket, base58.b58decode(text.encode("ascii")))
    except (ValueError, ProtocolError) as error:
        raise UriError("invite", "is no invitation, or not whole", fix) from error


def prove_admission(ticket: Ticket, swarm: bytes, peer: PeerId) -> AdmissionProof:
    """The proof that this peer shows from now on."""
    signature = Identity(ticket.seed).sign("admission", swarm, peer)
    return AdmissionProof(invitation=ticket.invitation, signature=signature)


def verify_proof(proof: AdmissionProof, peer: PeerId, owner: PeerId, swarm: bytes) -> None:
    """Raise ProtocolError(BAD_SIGNATURE) unless the owner signed the invitation and its ticket signed for `peer`."""
    invitation = proof.invitation
    payload = _invited(invitation.ticket, invitation.expires_s)
    verify_signature(owner, "invitation", swarm, payload, invitation.signature)
    verify_signature(invitation.ticket, "admission", swarm, peer, proof.signature)


def is_expired(invitation: Invitation, now_s: float) -> bool:
    """Whether the invitation lets in nobody any more, by a clock that may be somewhat off."""
    return now_s > invitation.expires_s + CLOCK_SKEW_MAX_S


def _invited(ticket: PeerId, expires_s: int) -> bytes:
    return ticket + expires_s.to_bytes(8, "big")


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What the certified log and the ledger say at this moment: who votes, whom the owner has admitted and banned."""

    voters: Set[bytes]
    admitted: Set[bytes]
    banned: Set[bytes]


class AdmissionTable:
    """One peer's judgement of who is admitted: the rule, and the proofs that were shown, at most PROOFS_MAX."""

    def __init__(self, rule: AdmissionRule, swarm: bytes, owner: PeerId, founders: tuple[PeerId, ...]) -> None:
        self.rule = rule
        self._swarm = swarm
        self._owner = owner
        self._trusted = frozenset((owner, *founders))
        self._proofs: dict[PeerId, AdmissionProof] = {}

    def take(self, peer: PeerId, proof: AdmissionProof | None, banned: Set[bytes]) -> None:
        """A peer shows this; raises ProtocolError(BAD_SIGNATURE) for what was not made for it. Of two proofs the one
        that holds for longer stays: an older presence may come after a newer one."""
        if proof is None or self.rule is not AdmissionRule.INVITED:
            return
        known = self._proofs.pop(peer, None)
        if known is not None:
            self._proofs[peer] = known  # shown last
            lasts = known.invitation.expires_s >= proof.invitation.expires_s
            if known == proof or (lasts and known.invitation.ticket not in banned):
                return
        verify_proof(proof, peer, self._owner, self._swarm)
        self._proofs[peer] = proof
        if len(self._proofs) > PROOFS_MAX:
            del self._proofs[next(iter(self._proofs))]

    def admits(self, peer: PeerId, known: Known, now_s: float) -> bool:
        """Whether this peer may take part, its own ban aside."""
        if self.rule is AdmissionRule.OPEN or peer in self._trusted or peer in known.voters or peer in known.admitted:
            return True
        return self.find_invitation(peer, known.banned, now_s) is not None

    def find_invitation(self, peer: PeerId, banned: Set[bytes], now_s: float) -> Invitation | None:
        """The invitation that lets this peer in now."""
        proof = self._proofs.get(peer)
        if proof is None or proof.invitation.ticket in banned or is_expired(proof.invitation, now_s):
            return None
        return proof.invitation
