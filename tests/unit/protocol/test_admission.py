"""Who is admitted: the rule, invitations and proofs, and everything that a proof must not be good for."""

from dataclasses import replace

import pytest

from shoal.protocol.admission import (
    CLOCK_SKEW_MAX_S,
    PROOFS_MAX,
    TICKET_TEXT_MAX,
    AdmissionProof,
    AdmissionRule,
    AdmissionTable,
    Known,
    Ticket,
    issue_ticket,
    parse_ticket,
    prove_admission,
    verify_proof,
)
from shoal.protocol.errors import ProtocolError, Refusal, UriError
from shoal.protocol.identity import Identity, PeerId
from shoal.protocol.messages import decode_message_untrusted, encode_message, verify_message
from shoal.protocol.wire import decode_record_untrusted, encode_record
from tests.unit.protocol.samples import IDENTITIES, OTHER_SWARM, PEERS, SWARM, make_presence

OWNER, FOUNDER, JOINER, STRANGER = IDENTITIES[:4]
EXPIRES_S = 1_800_000_000
NOW_S = EXPIRES_S - 1000.0
TICKET = issue_ticket(OWNER, SWARM, b"t" * 32, EXPIRES_S)
PROOF = prove_admission(TICKET, SWARM, JOINER.peer)
NOBODY = Known(voters=frozenset(), admitted=frozenset(), banned=frozenset())
NONE = frozenset[bytes]()


def make_table(rule: AdmissionRule = AdmissionRule.INVITED) -> AdmissionTable:
    return AdmissionTable(rule, SWARM, OWNER.peer, (FOUNDER.peer,))


def forge(**changes: object) -> AdmissionProof:
    return replace(PROOF, invitation=replace(PROOF.invitation, **changes))  # type: ignore[arg-type]


# -- the rule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "strangers", "listed", "invited"),
    [
        (AdmissionRule.OPEN, True, True, True),
        (AdmissionRule.LISTED, False, True, False),
        (AdmissionRule.INVITED, False, True, True),
    ],
)
def test_each_rule_lets_in_whom_it_names(rule: AdmissionRule, strangers: bool, listed: bool, invited: bool) -> None:
    table = make_table(rule)
    table.take(JOINER.peer, PROOF, NONE)
    known = replace(NOBODY, admitted=frozenset((PEERS[4],)))
    assert table.admits(STRANGER.peer, known, NOW_S) is strangers
    assert table.admits(PEERS[4], known, NOW_S) is listed
    assert table.admits(JOINER.peer, known, NOW_S) is invited
    assert table.admits(OWNER.peer, known, NOW_S) and table.admits(FOUNDER.peer, known, NOW_S)
    assert table.admits(STRANGER.peer, replace(NOBODY, voters=frozenset((STRANGER.peer,))), NOW_S), "who votes is in"


# -- proofs ----------------------------------------------------------------------------------------------------------


def test_a_proof_is_good_for_its_peer_and_its_swarm_alone() -> None:
    verify_proof(PROOF, JOINER.peer, OWNER.peer, SWARM)
    for peer, owner, swarm in (
        (STRANGER.peer, OWNER.peer, SWARM),
        (JOINER.peer, FOUNDER.peer, SWARM),
        (JOINER.peer, OWNER.peer, OTHER_SWARM),
    ):
        with pytest.raises(ProtocolError) as caught:
            verify_proof(PROOF, peer, owner, swarm)
        assert caught.value.refusal is Refusal.BAD_SIGNATURE


@pytest.mark.parametrize(
    "proof",
    [
        forge(expires_s=EXPIRES_S + 1),
        forge(ticket=STRANGER.peer),
        forge(signature=bytes(64)),
        replace(PROOF, signature=bytes(64)),
        prove_admission(issue_ticket(STRANGER, SWARM, b"t" * 32, EXPIRES_S), SWARM, JOINER.peer),
        prove_admission(issue_ticket(OWNER, OTHER_SWARM, b"t" * 32, EXPIRES_S), SWARM, JOINER.peer),
        prove_admission(TICKET, OTHER_SWARM, JOINER.peer),
        prove_admission(TICKET, SWARM, STRANGER.peer),
    ],
    ids=["longer", "other ticket", "unsigned", "no ticket", "stranger's", "other swarm's", "for another", "of another"],
)
def test_a_forged_proof_is_refused_and_changes_nothing(proof: AdmissionProof) -> None:
    table = make_table()
    with pytest.raises(ProtocolError) as caught:
        table.take(JOINER.peer, proof, NONE)
    assert caught.value.refusal is Refusal.BAD_SIGNATURE
    assert not table.admits(JOINER.peer, NOBODY, NOW_S)
    table.take(JOINER.peer, PROOF, NONE)
    with pytest.raises(ProtocolError):
        table.take(JOINER.peer, replace(proof, invitation=replace(proof.invitation, expires_s=2**62)), NONE)
    assert table.admits(JOINER.peer, NOBODY, NOW_S), "nor does it take away what was shown before"


def test_an_invitation_ends_by_the_clock_of_whoever_judges() -> None:
    table = make_table()
    table.take(JOINER.peer, PROOF, NONE)
    assert table.admits(JOINER.peer, NOBODY, EXPIRES_S + CLOCK_SKEW_MAX_S)
    assert not table.admits(JOINER.peer, NOBODY, EXPIRES_S + CLOCK_SKEW_MAX_S + 1)
    later = prove_admission(issue_ticket(OWNER, SWARM, b"u" * 32, EXPIRES_S + 9000), SWARM, JOINER.peer)
    table.take(JOINER.peer, later, NONE)
    table.take(JOINER.peer, PROOF, NONE)
    assert table.admits(JOINER.peer, NOBODY, EXPIRES_S + 8000), "an older presence does not shorten it"


def test_a_ban_of_the_ticket_withdraws_the_invitation() -> None:
    table, banned = make_table(), frozenset((TICKET.invitation.ticket,))
    table.take(JOINER.peer, PROOF, NONE)
    assert not table.admits(JOINER.peer, replace(NOBODY, banned=banned), NOW_S)
    shorter = prove_admission(issue_ticket(OWNER, SWARM, b"u" * 32, EXPIRES_S - 500), SWARM, JOINER.peer)
    table.take(JOINER.peer, shorter, banned)
    assert table.admits(JOINER.peer, replace(NOBODY, banned=banned), NOW_S)


def test_so_many_proofs_are_remembered_and_the_one_shown_last_stays() -> None:
    table = make_table()
    table.take(JOINER.peer, PROOF, NONE)
    crowd = [PeerId(number.to_bytes(32, "big")) for number in range(PROOFS_MAX)]
    for number, peer in enumerate(crowd):
        table.take(peer, prove_admission(TICKET, SWARM, peer), NONE)
        if number == PROOFS_MAX // 2:
            table.take(JOINER.peer, PROOF, NONE)
    assert table.admits(JOINER.peer, NOBODY, NOW_S) and not table.admits(crowd[0], NOBODY, NOW_S)
    assert sum(table.admits(peer, NOBODY, NOW_S) for peer in crowd) == PROOFS_MAX - 1


def test_a_presence_carries_a_proof_and_nothing_longer() -> None:
    presence = make_presence(2, admission=PROOF)
    raw = encode_message(SWARM, presence)
    assert decode_message_untrusted(SWARM, raw) == presence
    verify_message(presence.peer, SWARM, presence)
    with pytest.raises(ProtocolError) as caught:
        verify_message(presence.peer, SWARM, replace(presence, admission=None))
    assert caught.value.refusal is Refusal.BAD_SIGNATURE
    for changed in (replace(PROOF, signature=bytes(65)), forge(ticket=PeerId(bytes(33)))):
        with pytest.raises(ProtocolError) as caught:
            decode_message_untrusted(SWARM, encode_message(SWARM, make_presence(2, admission=changed)))
        assert caught.value.refusal is Refusal.OUT_OF_RANGE
    assert len(encode_record(PROOF)) < 256


# -- tickets ---------------------------------------------------------------------------------------------------------


def test_a_ticket_goes_through_text_and_shows_its_secret_to_nobody() -> None:
    assert parse_ticket(str(TICKET)) == TICKET
    assert len(str(TICKET)) <= TICKET_TEXT_MAX
    assert TICKET.invitation.ticket == Identity(TICKET.seed).peer
    assert "t" * 8 not in repr(TICKET) and TICKET.seed not in encode_record(PROOF)


@pytest.mark.parametrize(
    "text",
    ["", "0", "O0Il", "é", str(TICKET)[:-1], str(TICKET) + "1", "z" * (TICKET_TEXT_MAX + 1), "2" * TICKET_TEXT_MAX],
)
def test_what_is_no_ticket_is_named(text: str) -> None:
    with pytest.raises(UriError) as caught:
        parse_ticket(text)
    assert caught.value.field == "invite" and "URI" in caught.value.fix


def test_a_ticket_has_one_way_to_be_written() -> None:
    assert decode_record_untrusted(Ticket, encode_record(TICKET)) == TICKET
