"""Quorums, orders of rendezvous, bitmaps, and what makes a result or a certificate valid."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import short_peer_id
from shoal.protocol.messages import VOTERS_MAX, Certificate, PartResult, Result, Vote, digest_record
from shoal.protocol.quorum import (
    QuorumRule,
    check_bitmap,
    check_certificate,
    check_result,
    check_votes,
    choose_evaluator,
    choose_voters,
    has_member,
    list_members,
    make_bitmap,
    owner_order,
    proposer_order,
    quorum_size,
)
from tests.unit.protocol.samples import (
    IDENTITIES,
    OTHER_SWARM,
    PARTS,
    PEERS,
    certify,
    make_authority,
    make_head,
    make_sample_result,
    make_vote,
)

HEAD = make_head(voters=4)
RESULT = make_sample_result(HEAD)
CERTIFICATE = certify(RESULT, voters=3)
MAJORITY, TWO_THIRDS = QuorumRule.MAJORITY, QuorumRule.TWO_THIRDS


def test_every_contributor_measures_its_share_of_the_bases_and_all_name_the_same_one() -> None:
    heads = [bytes([number]) * 32 for number in range(200)]
    chosen = [choose_evaluator(head, PEERS[:4]) for head in heads]
    assert chosen == [choose_evaluator(head, PEERS[3::-1]) for head in heads]
    assert all(30 < chosen.count(peer) < 70 for peer in PEERS[:4])


@pytest.mark.parametrize("voters", range(1, VOTERS_MAX + 1))
def test_two_quorums_meet_in_as_many_voters_as_the_rule_needs(voters: int) -> None:
    majority, two_thirds = quorum_size(voters, MAJORITY), quorum_size(voters, TWO_THIRDS)
    assert 2 * majority > voters, "any two majorities share a voter"
    assert majority - 1 <= voters / 2, "and no smaller number does"
    liars = (voters - 1) // 3
    assert 2 * two_thirds - voters > liars, "any two share an honest voter"
    assert two_thirds <= voters - liars, "and the honest ones suffice"


def test_orders_are_permutations_that_the_last_round_draws() -> None:
    orders = {proposer_order(bytes([seed]) * 32, PEERS) for seed in range(20)}
    assert all(sorted(order) == list(PEERS) for order in orders)
    assert len(orders) > 10
    assert len({order[0] for order in orders}) > 3, "the lead goes round"
    assert proposer_order(HEAD.digest, PEERS) == proposer_order(HEAD.digest, PEERS[::-1])


def test_every_part_has_an_order_of_its_own() -> None:
    orders = {owner_order(HEAD.digest, part, PEERS) for part in range(20)}
    assert len({order[0] for order in orders}) > 3
    without = owner_order(HEAD.digest, 3, PEERS[1:])
    assert without == tuple(peer for peer in owner_order(HEAD.digest, 3, PEERS) if peer != PEERS[0])


def test_next_voters_are_those_who_stay_then_the_contributors() -> None:
    current, contributors = (PEERS[5], PEERS[1]), (PEERS[0], PEERS[1], PEERS[2])
    assert choose_voters(current, contributors, frozenset()) == (PEERS[5], PEERS[1], PEERS[0], PEERS[2])
    assert choose_voters(current, contributors, frozenset({PEERS[5], PEERS[2]})) == (PEERS[1], PEERS[0])
    assert choose_voters(current, (), frozenset(current)) == current, "somebody has to vote"


def test_there_are_never_more_voters_than_the_bound() -> None:
    many = tuple(bytes([number]) * 32 for number in range(VOTERS_MAX + 5))
    assert choose_voters(many[:2], many, frozenset()) == many[:VOTERS_MAX]  # type: ignore[arg-type]  # any bytes do


@pytest.mark.parametrize("count", [1, 7, 8, 9, 64])
def test_a_bitmap_lists_whom_it_was_made_of(count: int) -> None:
    for indices in ({0}, {count - 1}, set(range(count)), set(range(0, count, 3))):
        bitmap = make_bitmap(frozenset(indices), count)
        check_bitmap(bitmap, count)
        assert list_members(bitmap, count) == tuple(sorted(indices))
        assert [has_member(bitmap, index) for index in range(count)] == [index in indices for index in range(count)]
    assert not has_member(make_bitmap(frozenset({0}), count), 8 * 8)


def test_the_first_member_is_the_lowest_bit() -> None:
    assert make_bitmap(frozenset({0, 3, 9}), 10) == b"\x09\x02"


@pytest.mark.parametrize(
    ("bitmap", "count"),
    [(b"", 3), (b"\x00", 3), (b"\x08", 3), (b"\x80", 7), (b"\x01\x00", 8), (b"\xff", 9), (b"\x01\x04", 10)],
)
def test_a_bitmap_that_does_not_fit_is_refused(bitmap: bytes, count: int) -> None:
    with pytest.raises(ProtocolError, match=f"roster of {count}") as caught:
        check_bitmap(bitmap, count)
    assert caught.value.refusal is Refusal.OUT_OF_RANGE


@pytest.mark.parametrize(
    ("spoil", "refusal"),
    [
        (lambda one: replace(one, round=2), Refusal.WRONG_ROUND),
        (lambda one: replace(one, round=0), Refusal.WRONG_ROUND),
        (lambda one: replace(one, previous=b"x" * 32), Refusal.OTHER_LOG),
        (lambda one: replace(one, base_root=b"x" * 32), Refusal.OTHER_LOG),
        (lambda one: replace(one, parts=one.parts[:-1]), Refusal.WRONG_LENGTH),
        (lambda one: replace(one, parts=one.parts * 2), Refusal.WRONG_LENGTH),
        (lambda one: replace(one, parts=()), Refusal.WRONG_LENGTH),
        (lambda one: replace(one, members=()), Refusal.WRONG_LENGTH),
        (
            lambda one: replace(one, parts=(*one.parts[1:], PartResult(digest=b"d" * 32, contributors=b"\x08"))),
            Refusal.OUT_OF_RANGE,
        ),
        (lambda one: replace(one, voters=(*one.voters, one.voters[0])), Refusal.NOT_A_MEMBER),
        (lambda one: replace(one, voters=(*one.voters, PEERS[7])), Refusal.NOT_A_MEMBER),
    ],
)
def test_a_result_that_cannot_follow_is_refused(spoil: Callable[[Result], Result], refusal: Refusal) -> None:
    check_result(RESULT, HEAD, PARTS)
    with pytest.raises(ProtocolError) as caught:
        check_result(spoil(RESULT), HEAD, PARTS)
    assert caught.value.refusal is refusal


def test_a_result_may_change_the_voters_and_nothing_else() -> None:
    check_result(replace(RESULT, members=(), parts=(), voters=PEERS[:2]), HEAD, PARTS)
    check_result(replace(make_sample_result(HEAD, members=6), voters=PEERS[2:6]), HEAD, PARTS)


def test_a_certificate_names_its_result() -> None:
    assert check_certificate(CERTIFICATE, HEAD, make_authority()) == digest_record(RESULT)
    with pytest.raises(ProtocolError) as caught:
        check_certificate(CERTIFICATE, make_head(round_number=1), make_authority())
    assert caught.value.refusal is Refusal.WRONG_ROUND


@pytest.mark.parametrize(
    ("votes", "rule", "refusal", "words"),
    [
        (CERTIFICATE.votes[:2], MAJORITY, Refusal.NO_QUORUM, "2 votes of 4"),
        (CERTIFICATE.votes[:2], TWO_THIRDS, Refusal.NO_QUORUM, "2 votes of 4"),
        (CERTIFICATE.votes[:2] * 2, MAJORITY, Refusal.DUPLICATE, short_peer_id(PEERS[0])),
        (
            (*CERTIFICATE.votes, make_vote(IDENTITIES[4], RESULT)),
            MAJORITY,
            Refusal.NOT_A_MEMBER,
            short_peer_id(PEERS[4]),
        ),
        (
            (*CERTIFICATE.votes[:2], make_vote(IDENTITIES[2], RESULT, attempt=1)),
            MAJORITY,
            Refusal.WRONG_ATTEMPT,
            short_peer_id(PEERS[2]),
        ),
        (
            (*CERTIFICATE.votes[:2], make_vote(IDENTITIES[2], replace(RESULT, codec="fp32"))),
            MAJORITY,
            Refusal.WRONG_ATTEMPT,
            short_peer_id(PEERS[2]),
        ),
        (
            (*CERTIFICATE.votes[:2], make_vote(IDENTITIES[2], RESULT, swarm=OTHER_SWARM)),
            MAJORITY,
            Refusal.BAD_SIGNATURE,
            short_peer_id(PEERS[2]),
        ),
        (
            (*CERTIFICATE.votes[:2], replace(CERTIFICATE.votes[1], voter=PEERS[2])),
            MAJORITY,
            Refusal.BAD_SIGNATURE,
            short_peer_id(PEERS[2]),
        ),
    ],
)
def test_votes_that_are_no_quorum_are_refused(
    votes: tuple[Vote, ...], rule: QuorumRule, refusal: Refusal, words: str
) -> None:
    with pytest.raises(ProtocolError) as caught:
        check_votes(
            Certificate(result=RESULT, attempt=0, votes=votes), HEAD.voters, replace(make_authority(), rule=rule)
        )
    assert caught.value.refusal is refusal
    assert words in caught.value.detail


def test_the_attempt_of_a_certificate_is_that_of_its_votes() -> None:
    with pytest.raises(ProtocolError) as caught:
        check_votes(replace(CERTIFICATE, attempt=1), HEAD.voters, make_authority())
    assert caught.value.refusal is Refusal.WRONG_ATTEMPT
    check_votes(certify(RESULT, attempt=7), HEAD.voters, make_authority())


def test_a_quorum_by_majority_may_be_none_by_two_thirds() -> None:
    voters = PEERS[:6]
    votes = certify(RESULT, voters=4)
    check_votes(votes, voters, make_authority())
    with pytest.raises(ProtocolError, match="4 votes of 6"):
        check_votes(votes, voters, replace(make_authority(), rule=TWO_THIRDS))
    check_votes(certify(RESULT, voters=5), voters, replace(make_authority(), rule=TWO_THIRDS))
