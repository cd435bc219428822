"""Which checkpoints are believed, and which ones are kept."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import Identity
from shoal.protocol.messages import Certificate, Checkpoint, digest_record
from shoal.protocol.quorum import QuorumRule, quorum_size
from shoal.protocol.trail import Anchor, blocking_size, check_trail, choose_trail, make_candidate
from tests.unit.crdt.certificates import certify, make_authority, make_result, reroot

SWARM = b"s" * 32
OWNER = Identity(b"o" * 32)
PEOPLE = [Identity(bytes([number + 1]) * 32) for number in range(9)]
OLD, MIXED, NEW = PEOPLE[:4], PEOPLE[2:6], PEOPLE[5:]
AUTHORITY = make_authority(SWARM, OWNER.peer, QuorumRule.TWO_THIRDS)
GENESIS = Anchor(round=0, digest=SWARM, voters=tuple(one.peer for one in OLD))


def grow(log: Sequence[Certificate], voters: Sequence[Identity], following: Sequence[Identity]) -> list[Certificate]:
    """One more round, by a quorum of `voters`, the last ones of them."""
    previous = digest_record(log[-1].result) if log else SWARM
    result = make_result(len(log) + 1, previous, [one.peer for one in following], {voters[0].peer: 10})
    return [*log, certify(SWARM, result, voters[-quorum_size(len(voters), AUTHORITY.rule) :])]


def checkpoint(log: Sequence[Certificate], number: int) -> Checkpoint:
    return Checkpoint(before=log[number - 2].result if number > 1 else None, certificate=log[number - 1])


STEADY = grow(grow(grow([], OLD, OLD), OLD, OLD), OLD, OLD)


def refuse(*checkpoints: Checkpoint, anchor: Anchor = GENESIS) -> Refusal:
    with pytest.raises(ProtocolError) as caught:
        check_trail(anchor, checkpoints, AUTHORITY)
    return caught.value.refusal


def test_with_the_same_voters_one_step_leads_to_any_round() -> None:
    end = check_trail(GENESIS, [checkpoint(STEADY, 3)], AUTHORITY)
    assert (end.round, end.digest, end.voters) == (3, digest_record(STEADY[2].result), GENESIS.voters)
    assert check_trail(GENESIS, [checkpoint(STEADY, number) for number in (1, 2, 3)], AUTHORITY) == end
    assert choose_trail(GENESIS.voters, [make_candidate(one) for one in STEADY], AUTHORITY.rule) == [2]


def test_voters_who_are_all_new_are_reached_over_those_between() -> None:
    log = grow(grow(grow(grow([], OLD, MIXED), MIXED, NEW), NEW, NEW), NEW, NEW)
    assert refuse(checkpoint(log, 4)) is Refusal.NO_QUORUM
    chosen = choose_trail(GENESIS.voters, [make_candidate(one) for one in log], AUTHORITY.rule)
    assert chosen == [0, 1, 3], "who decided round 2 has nobody in common with who decided round 4"
    assert check_trail(GENESIS, [checkpoint(log, index + 1) for index in chosen], AUTHORITY).round == 4


@pytest.mark.parametrize("rule", QuorumRule)
@pytest.mark.parametrize("voters", range(1, 32))
def test_of_a_blocking_set_one_is_in_every_quorum_and_one_does_not_lie(voters: int, rule: QuorumRule) -> None:
    blocking = blocking_size(voters, rule)
    assert blocking + quorum_size(voters, rule) == voters + 1
    if rule is QuorumRule.TWO_THIRDS:
        liars = -(-voters // 3) - 1  # fewer than a third
        assert blocking == liars + 1


def test_what_names_other_voters_than_the_round_before_did_is_refused() -> None:
    forger = Identity(b"f" * 32)
    told = replace(STEADY[1].result, voters=(*STEADY[1].result.voters, forger.peer))
    assert refuse(Checkpoint(before=told, certificate=STEADY[2])) is Refusal.WRONG_DIGEST
    named = make_result(3, digest_record(told), [forger.peer], {forger.peer: 1})
    alone = replace(told, voters=(forger.peer,))
    named = replace(named, previous=digest_record(alone))
    assert refuse(Checkpoint(before=alone, certificate=certify(SWARM, named, [forger]))) is Refusal.NO_QUORUM


def test_votes_of_too_few_of_the_round_s_own_voters_are_no_checkpoint() -> None:
    log = grow(grow([], OLD, PEOPLE), PEOPLE, PEOPLE)
    few = replace(log[1], votes=certify(SWARM, log[1].result, OLD).votes)
    assert refuse(Checkpoint(before=log[0].result, certificate=few)) is Refusal.NO_QUORUM


def test_a_checkpoint_without_the_round_before_it_or_of_an_older_round_is_refused() -> None:
    assert refuse(Checkpoint(before=None, certificate=STEADY[2])) is Refusal.WRONG_ROUND
    assert refuse(Checkpoint(before=STEADY[0].result, certificate=STEADY[2])) is Refusal.WRONG_ROUND
    assert refuse(checkpoint(STEADY, 3), checkpoint(STEADY, 2)) is Refusal.WRONG_ROUND
    other = Anchor(round=1, digest=b"x" * 32, voters=GENESIS.voters)
    assert refuse(checkpoint(STEADY, 2), anchor=other) is Refusal.OTHER_LOG


def test_a_reroot_is_believed_behind_its_own_round_before_only() -> None:
    log = [*STEADY, reroot(SWARM, 4, digest_record(STEADY[2].result), NEW, OWNER)]
    log = grow(grow(log, NEW, NEW), NEW, NEW)
    assert refuse(checkpoint(log, 4)) is Refusal.NOT_A_MEMBER
    candidates = [make_candidate(one) for one in log]
    assert choose_trail(GENESIS.voters, candidates, AUTHORITY.rule) == [2, 3, 5]
    assert check_trail(GENESIS, [checkpoint(log, number) for number in (3, 4, 6)], AUTHORITY).round == 6


def test_no_trail_is_found_where_none_leads() -> None:
    log = grow(grow(grow(grow([], OLD, MIXED), MIXED, NEW), NEW, NEW), NEW, NEW)
    assert choose_trail(GENESIS.voters, [make_candidate(log[3])], AUTHORITY.rule) is None
    assert choose_trail(GENESIS.voters, [], AUTHORITY.rule) == []
