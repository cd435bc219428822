"""The round core when a quorum is gone for good: the owner's word, the declared timer, and two logs that meet again."""

from dataclasses import replace

import pytest

from shoal.protocol.effects import AttemptFailed, Behind, Forked, Phase, Pledge, Send
from shoal.protocol.errors import Failure, Refusal
from shoal.protocol.identity import PeerId
from shoal.protocol.lineage import is_lawful, weigh
from shoal.protocol.manifest import Rounds
from shoal.protocol.messages import Certificate, Certified, Nack, Prepare, Promise, Proposal, Vote, digest_record
from shoal.protocol.proposer import make_voters_result
from shoal.protocol.quorum import REROOT_ATTEMPT, Head, proposer_order
from tests.unit.protocol.round_table import Seat, Table, drop_of, effects_of, refusal_of, withhold
from tests.unit.protocol.samples import (
    IDENTITIES,
    OTHER_SWARM,
    PEERS,
    RULES,
    SWARM,
    certify,
    make_sample_result,
    make_vote,
)

AFTER_S = 60.0
MARGIN_S = RULES.commit_timeout_s + 1.0
TIMED = replace(RULES, reroot_after_s=AFTER_S)
OWNER = 0


def sign_reroot(head: Head, voters: tuple[PeerId, ...], *signers: int, swarm: bytes = SWARM) -> Certificate:
    """A certificate by which these peers name the next voters."""
    result = make_voters_result(head, RULES.codec, voters)
    votes = tuple(make_vote(IDENTITIES[number], result, REROOT_ATTEMPT, swarm) for number in signers)
    return Certificate(result=result, attempt=REROOT_ATTEMPT, votes=votes)


def leave_alive(table: Table, *numbers: int) -> tuple[PeerId, ...]:
    """Only these peers survive."""
    for seat in table.seats:
        if seat.number not in numbers:
            table.kill(seat)
    return tuple(PEERS[number] for number in numbers)


def go_on(table: Table, number: int, *seats: Seat) -> None:
    """These seats, and only they, certify this round together."""
    table.make_ready(*seats)
    for _ in range(240):
        table.settle()
        if all(seat.core.head.round >= number for seat in seats):
            return
        table.advance(0.5)
    raise AssertionError([seat.core.view() for seat in seats])


# -- the owner's word -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quorum", ["majority", "two_thirds"])
@pytest.mark.parametrize("survivors", [(3, 4), (0, 4), (2,)])
def test_everybody_follows_the_owner_and_the_swarm_goes_on(quorum: str, survivors: tuple[int, ...]) -> None:
    table = Table(5, rules=replace(RULES, quorum=quorum, reroot_after_s=0.0, peers_min=1))
    voters = leave_alive(table, *survivors)
    table.make_ready()
    table.advance(100.0)
    assert all(seat.committed == [] for seat in table.up())
    certificate = sign_reroot(table.head, voters, OWNER)
    for seat in table.up():
        table.hear(seat, certificate)
    assert table.result().voters == voters
    table.make_ready()
    table.run(2)
    assert {member.peer for member in table.result(2).members} == set(voters)


def test_the_owner_may_replace_voters_that_are_there() -> None:
    table = Table(5, rules=TIMED)
    certificate = sign_reroot(table.head, PEERS[3:5], OWNER)
    for seat in table.seats:
        table.hear(seat, certificate)
    assert table.result().voters == PEERS[3:5]
    table.make_ready()
    table.settle()
    assert {vote.voter for vote in table.seats[0].committed[1].votes} == set(PEERS[3:5])


@pytest.mark.parametrize("after_s", [0.0, AFTER_S])
def test_nobody_else_speaks_for_the_owner(after_s: float) -> None:
    table = Table(5, rules=replace(RULES, reroot_after_s=after_s))
    leave_alive(table, 3, 4)
    seat = table.seats[3]
    good = sign_reroot(table.head, PEERS[3:5], OWNER)
    with_parts = replace(make_sample_result(table.head, members=4), voters=PEERS[:4])
    updated = replace(good, result=with_parts, votes=(make_vote(IDENTITIES[OWNER], with_parts, REROOT_ATTEMPT),))
    another = replace(good.result, voters=PEERS[2:4])
    alone = Refusal.NOT_A_MEMBER if after_s == 0.0 else Refusal.NO_QUORUM
    for forged, refusal in (
        (sign_reroot(table.head, PEERS[3:5], 1), alone),
        (sign_reroot(table.head, PEERS[3:5], 7), alone),
        (sign_reroot(table.head, PEERS[3:5], OWNER, 4), alone),
        (sign_reroot(table.head, PEERS[3:5], OWNER, swarm=OTHER_SWARM), Refusal.BAD_SIGNATURE),
        (replace(good, votes=(replace(good.votes[0], signature=bytes(64)),)), Refusal.BAD_SIGNATURE),
        (replace(good, result=another), Refusal.WRONG_ATTEMPT),
        (replace(good, attempt=3), Refusal.WRONG_ATTEMPT),
        (updated, Refusal.NOT_PLANNED),
    ):
        assert refusal_of(seat, Certified(certificate=forged), PEERS[4]) is refusal
    old = sign_reroot(replace(table.head, digest=b"o" * 32), PEERS[3:5], OWNER)
    assert drop_of(seat, Certified(certificate=old), PEERS[4]) is Refusal.OTHER_LOG, "it is for another state"


# -- the declared timer ---------------------------------------------------------------------------------------------


def test_who_is_there_first_waits_for_the_others_however_late_they_are() -> None:
    table = Table(5, rules=TIMED)
    leave_alive(table, 0, 1)
    for seat in table.up():
        table.kill(seat)
    for number in (0, 1):
        table.restart(table.seats[number])
    table.make_ready()
    table.advance(5 * AFTER_S)
    assert all(seat.committed == [] and seat.said(Proposal) == [] for seat in table.up())
    table.restart(table.seats[2])
    table.make_ready()
    table.run(1)
    assert {member.peer for member in table.result().members} == set(PEERS[:3]), "one log, with a quorum behind it"
    # From now on a quorum that is gone is gone, and the timer counts, after a restart, too.
    leave_alive(table, 0, 1)
    table.kill(table.seats[0])
    table.restart(table.seats[0])
    table.advance(AFTER_S + MARGIN_S)
    assert set(table.result(2).voters) == set(PEERS[:2])


@pytest.mark.parametrize("survivors", [(0, 1), (1, 4), (3,)])
def test_after_the_declared_timer_the_peers_that_are_left_go_on(survivors: tuple[int, ...]) -> None:
    table = Table(5, rules=replace(TIMED, peers_min=len(survivors)))
    voters = leave_alive(table, *survivors)
    table.make_ready()
    table.advance(AFTER_S - 0.1)
    assert all(seat.committed == [] for seat in table.up())
    table.advance(0.2 + MARGIN_S)
    result = table.result()
    assert set(result.voters) == set(voters) and (result.parts, result.members) == ((), ())
    assert table.attempts() == {REROOT_ATTEMPT}
    for number in (2, 3):
        table.make_ready()
        table.run(number)
        assert {member.peer for member in table.result(number).members} == set(voters)
    assert all(seat.did(Forked) == [] for seat in table.up())


@pytest.mark.parametrize(
    "rules", [replace(TIMED, quorum="two_thirds"), replace(RULES, reroot_after_s=0.0)], ids=["two_thirds", "never"]
)
def test_without_a_timer_a_minority_waits_for_ever(rules: Rounds) -> None:
    table = Table(5, rules=rules)
    leave_alive(table, 0, 1)
    table.make_ready()
    table.advance(20 * AFTER_S)
    assert all(seat.committed == [] and seat.said(Proposal) == [] for seat in table.up())
    declared = sign_reroot(table.head, PEERS[:2], 0, 1)
    assert refusal_of(table.seats[1], Certified(certificate=declared), PEERS[0]) is Refusal.NOT_A_MEMBER


def test_a_quorum_that_comes_back_in_time_stops_the_timer() -> None:
    table = Table(5, rules=TIMED)
    leave_alive(table, 0, 1)
    for _ in range(3):
        table.advance(AFTER_S - 1.0)
        table.restart(table.seats[2])
        table.advance(5.0)
        table.kill(table.seats[2])
    assert all(seat.committed == [] and seat.said(Proposal) == [] for seat in table.up())
    table.advance(AFTER_S + MARGIN_S)
    assert set(table.result().voters) == set(PEERS[:2])


def test_a_quorum_that_comes_back_while_a_certified_round_is_fetched_stops_the_timer() -> None:
    table = Table(5, rules=TIMED)
    table.blobs_are_found = False
    leave_alive(table, 0, 1)
    table.advance(AFTER_S / 2)
    result = make_sample_result(table.head)
    by_others = tuple(make_vote(IDENTITIES[number], result) for number in (2, 3, 4))
    certificate = Certificate(result=result, attempt=0, votes=by_others)
    for seat in table.up():
        table.hear(seat, certificate)
        assert seat.core.phase is Phase.FETCH
    table.restart(table.seats[2])
    table.advance(5.0)
    table.kill(table.seats[2])
    for seat in table.up():
        for part in result.parts:
            table.hold(seat, part.digest)
    table.settle()
    assert [seat.core.round for seat in table.up()] == [2, 2]
    table.advance(AFTER_S - 1.0)
    assert all(seat.said(Proposal) == [] for seat in table.up())
    table.advance(1.0 + MARGIN_S)
    assert set(table.result(2).voters) == set(PEERS[:2])


def certify_by_the_dead(table: Table, *survivors: int) -> Certificate:
    """The first round, certified by three of five: these have the certificate and no bytes, the others are gone."""
    table.blobs_are_found = False
    leave_alive(table, *survivors)
    result = make_sample_result(table.head)
    certificate = Certificate(
        result=result, attempt=0, votes=tuple(make_vote(IDENTITIES[number], result) for number in (2, 3, 4))
    )
    for number in survivors:
        table.hear(table.seats[number], certificate)
        assert table.seats[number].core.phase is Phase.FETCH
    return certificate


@pytest.mark.parametrize("told", [(0, 1), (0,), (1,)])
def test_an_update_that_died_with_its_quorum_is_given_up_after_the_timer(told: tuple[int, ...]) -> None:
    table = Table(5, rules=TIMED)
    certify_by_the_dead(table, *told)
    leave_alive(table, 0, 1)
    for number in {0, 1} - {*told}:
        table.restart(table.seats[number])
    table.advance(AFTER_S - 1.0)
    assert all(seat.committed == [] for seat in table.up())
    table.advance(1.0 + 2 * MARGIN_S)
    assert set(table.result().voters) == set(PEERS[:2])
    lost = [note for seat in table.up() for note in seat.did(AttemptFailed) if note.reason is Failure.UPDATE_LOST]
    assert len(lost) in range(1, 3), "who gave it up does not take it up again"


def test_an_update_that_somebody_in_sight_has_applied_is_not_given_up() -> None:
    table = Table(5, rules=TIMED)
    certificate = certify_by_the_dead(table, 0, 1)
    slow, holder = table.seats[0], table.seats[1]
    for part in certificate.result.parts:
        table.hold(holder, part.digest)
    table.settle()
    assert holder.core.round == 2
    table.meet()
    table.advance(2 * AFTER_S)
    assert slow.core.phase is Phase.FETCH and slow.said(Proposal) == []
    for part in certificate.result.parts:
        table.hold(slow, part.digest)
    table.advance(AFTER_S + MARGIN_S)
    assert set(table.result(2).voters) == set(PEERS[:2])


def test_a_quorum_in_sight_is_asked_for_the_update_for_ever() -> None:
    table = Table(5, rules=TIMED)
    certify_by_the_dead(table, 0, 1)
    table.restart(table.seats[2])
    table.advance(3 * AFTER_S)
    assert [table.seats[number].core.phase for number in (0, 1)] == [Phase.FETCH] * 2


@pytest.mark.parametrize("rules", [RULES, TIMED])
def test_the_owner_ends_the_wait_for_an_update_that_is_gone(rules: Rounds) -> None:
    table = Table(5, rules=replace(rules, peers_min=1))
    certify_by_the_dead(table, 0, 1)
    by_owner = sign_reroot(table.head, PEERS[:2], OWNER)
    declared = sign_reroot(table.head, PEERS[1:2], 1)
    for seat in table.up():
        if rules is TIMED:
            table.hear(seat, declared)
            assert seat.committed == [], "only the owner's word counts before the timer has run out"
        table.hear(seat, by_owner)
    assert table.result().voters == PEERS[:2]


def test_a_declaration_needs_the_word_of_everybody_whom_it_names() -> None:
    table = Table(5, rules=TIMED)
    alone, between, *others = table.order()
    table.blocked = lambda effect, source, target: alone in (source, target) and between not in (source, target)
    for seat in others:
        alone.core.lose(seat.peer, table.now)
        seat.core.lose(alone.peer, table.now)
    table.advance(3 * AFTER_S)
    assert all(seat.committed == [] for seat in table.seats)
    assert between.said(Vote) == [], "it sees a quorum"
    for seat in others:
        between.core.lose(seat.peer, table.now)
    table.advance(RULES.presence_timeout_s + MARGIN_S)
    assert set(alone.core.head.voters) == set(between.core.head.voters) == {alone.peer, between.peer}


def test_a_declared_reroot_names_its_sender_and_changes_nothing_else() -> None:
    table = Table(5, rules=TIMED)
    leave_alive(table, 0, 1)
    seat = table.seats[1]
    fitting = Proposal(attempt=REROOT_ATTEMPT, result=make_voters_result(table.head, RULES.codec, PEERS[:2]))
    with_parts = make_sample_result(table.head, members=4)
    for result in (replace(fitting.result, voters=PEERS[1:2]), with_parts):
        assert refusal_of(seat, replace(fitting, result=result), PEERS[0]) is Refusal.NOT_PLANNED
    assert effects_of(seat, fitting, PEERS[0]) == [], "it has not missed the quorum for long enough"
    other_log = replace(fitting.result, previous=b"x" * 32)
    assert drop_of(seat, replace(fitting, result=other_log), PEERS[0]) is Refusal.OTHER_LOG


def test_a_voter_among_a_live_quorum_does_not_follow_a_declaration() -> None:
    table = Table(5, rules=TIMED)
    declared = sign_reroot(table.head, PEERS[3:5], 3, 4)
    for seat in table.seats[:3]:
        table.hear(seat, declared)
        assert seat.committed == [] and seat.core.round == 1
    go_on(table, 1, *table.seats[:3])
    assert table.seats[0].committed[0].result != declared.result


def test_a_declaration_without_an_old_voter_is_none() -> None:
    table = Table(6, voters=4, rules=TIMED)
    strangers = sign_reroot(table.head, PEERS[4:6], 4, 5)
    for seat in (table.seats[0], table.seats[5]):
        assert refusal_of(seat, Certified(certificate=strangers), PEERS[4]) is Refusal.NO_QUORUM


@pytest.mark.parametrize("count", [2, 3])
def test_newcomers_that_have_outlived_every_voter_declare_nothing(count: int) -> None:
    table = Table(count, voters=1, rules=TIMED)
    table.kill(table.seats[0])
    table.advance(4 * AFTER_S)
    assert all(seat.committed == [] for seat in table.up())
    assert table.refusals == []


def test_a_newcomer_does_not_put_off_a_declaration() -> None:
    table = Table(6, voters=5, rules=TIMED)
    newcomer = table.seats[5]
    table.kill(newcomer)
    leave_alive(table, 0, 1)
    table.advance(AFTER_S - 5.0)
    table.restart(newcomer)
    table.advance(10.0 + MARGIN_S)
    assert set(PEERS[:2]) <= set(table.result().voters)


# -- two logs -------------------------------------------------------------------------------------------------------


def certified_tokens(seat: Seat) -> int:
    return weigh(seat.committed).tokens


def go_over(table: Table, loser: Seat, winner: Seat) -> None:
    """What the shell does after it has compared the logs: back to where they part, then the other's rounds."""
    first = next(
        place
        for place, (own, other) in enumerate(zip(loser.committed, winner.committed, strict=False))
        if own.result != other.result
    )
    assert is_lawful(loser.committed[first], winner.committed[first])
    assert first == 0, "in these tests logs part at the first round"
    loser.committed, loser.ready = [], None
    leave_for(loser, table, winner.committed[0], end=winner.core.head.round)
    table.carry_out(loser)
    for certificate in winner.committed:
        table.hear(loser, certificate)
        table.settle()


def test_two_sides_that_declare_make_two_logs_and_the_heavier_one_stays() -> None:
    table = Table(5, rules=TIMED)
    left, right, alone = table.seats[:2], table.seats[2:4], table.seats[4:]
    table.part(tuple(left), tuple(right), tuple(alone))
    table.advance(AFTER_S + MARGIN_S)
    for side in (left, right, alone):
        assert [set(seat.core.head.voters) for seat in side] == [{seat.peer for seat in side}] * len(side)
    assert len({seat.core.head.digest for seat in table.seats}) == 3
    go_on(table, 2, *left)
    go_on(table, 3, *left)
    go_on(table, 2, *right)
    assert certified_tokens(left[0]) > certified_tokens(right[0]) > certified_tokens(alone[0]) == 0

    table.heal()
    for seat in table.seats:
        table.carry_out(seat)
        mine = {other.number for side in (left, right, alone) if seat in side for other in side}
        assert len(seat.did(Forked)) + len(seat.did(Behind)) > 0, "it sees that others follow another log"
        assert all(PEERS.index(effect.peer) not in mine for effect in seat.did(Forked))
    assert any(seat.did(Forked) for seat in left)
    assert table.refusals == []

    for seat in (*right, *alone):
        go_over(table, seat, left[0])
        assert seat.core.head == left[0].core.head
    table.meet()
    table.make_ready(*right, *alone)
    go_on(table, 4, *left)
    table.settle()
    assert len({seat.core.head for seat in table.seats}) == 1
    assert {member.peer for member in table.result(4).members} == set(PEERS[:5]), "the losing side contributes again"
    assert table.result(4).voters == (*left[0].committed[2].result.voters, *PEERS[2:5])
    assert table.refusals == []


def test_a_majority_goes_on_and_the_others_come_back_to_it() -> None:
    table = Table(5, rules=TIMED)
    many, few = table.seats[:3], table.seats[3:]
    table.part(tuple(many), tuple(few))
    for number in (1, 2, 3):
        go_on(table, number, *many)
    table.advance(AFTER_S + MARGIN_S)
    assert [set(seat.core.head.voters) for seat in few] == [set(PEERS[3:5])] * 2
    go_on(table, 2, *few)
    table.heal()
    for seat in few:
        go_over(table, seat, many[0])
    table.meet()
    table.make_ready(*few)
    go_on(table, 4, *many)
    table.settle()
    assert set(table.result(4).voters) == set(PEERS[:5])
    assert table.refusals == []


def test_a_quorum_that_certifies_nothing_follows_those_who_have_gone_on() -> None:
    # Three of three must be ready, and the third has declared a log of its own: neither side can go on alone.
    table = Table(3, rules=replace(TIMED, peers_min=3))
    table.beats = True
    many, few = table.seats[:2], table.seats[2:]
    table.part(tuple(many), tuple(few))
    table.advance(AFTER_S + MARGIN_S)
    assert [seat.core.head.round for seat in table.seats] == [0, 0, 1]
    table.heal()
    table.hear(many[0], few[0].committed[0])
    table.hear(many[1], few[0].committed[0])
    assert {seat.core.head.digest for seat in table.seats} == {few[0].core.head.digest}
    table.make_ready()
    table.run(2)
    assert table.result(2).round == 2


def test_nobody_is_accused_while_two_logs_meet() -> None:
    # The many have named the few voters again before they knew that these follow a log of their own.
    table = Table(5, rules=TIMED)
    table.beats = True
    many, few = table.seats[:3], table.seats[3:]
    table.part(tuple(many), tuple(few))
    table.advance(AFTER_S + MARGIN_S)
    assert [set(seat.core.head.voters) for seat in few] == [set(PEERS[3:5])] * 2
    assert all(seat.core.head.round == 0 for seat in many)
    for seat in many:
        table.restart(seat)  # so that the round has not been open for long
    table.heal()
    for number in (1, 2, 3):
        table.make_ready(*few)
        go_on(table, number, *many)
    assert set(many[0].core.head.voters) == set(PEERS[:5])
    assert table.refusals == []
    assert any(seat.did(Forked) for seat in many) and any(seat.did(Forked) for seat in few)


def test_a_peer_of_another_log_is_not_accused_of_leading_out_of_turn() -> None:
    table = Table(5, rules=TIMED)
    many, few = table.seats[:3], table.seats[3:]
    table.part(tuple(many), tuple(few))
    table.advance(AFTER_S + MARGIN_S)
    result = replace(make_sample_result(table.head, members=3), voters=PEERS[:5])
    for seat in many:
        for part in result.parts:
            table.hold(seat, part.digest)
        table.hear(seat, certify(result))
    assert {seat.core.round for seat in table.seats} == {2}
    table.heal()
    for attempt, peer in enumerate(proposer_order(many[0].core.head.digest, PEERS[:5])):
        ballots = (
            Prepare(round=2, attempt=attempt),
            Nack(round=2, attempt=attempt, promised=attempt + 1),
            Promise(round=2, attempt=attempt, accepted_attempt=0, accepted=None),
        )
        for message in ballots:
            if table.seat(peer) in many:
                assert few[0].core.receive(message, peer, table.now) in (Refusal.OTHER_LOG, Refusal.WRONG_ATTEMPT)


def leave_for(seat: Seat, table: Table, certificate: Certificate, end: int) -> None:
    """What the shell does when it has compared two logs that part in round 1."""
    digest = digest_record(certificate.result)
    seat.vote = seat.core.leave_log(Pledge(first=1, digest=digest, end=end, tokens=0))
    seat.core.take_effects()
    seat.core.switch(table.head, table.now)


def test_who_goes_over_puts_away_what_it_voted_for_and_knows_where_it_goes() -> None:
    table = Table(5, rules=replace(TIMED, peers_min=1))
    table.part(tuple(table.seats[:4]), tuple(table.seats[4:]))
    seat = table.seats[4]
    table.advance(AFTER_S + MARGIN_S)
    go_on(table, 2, seat)
    assert seat.core.head.round == 2 and seat.vote is not None and seat.vote.round == 2
    table.make_ready(seat, label="/open")
    seat.core.take_effects()
    seat.vote = before = seat.core._vote
    assert before.round == 3 and before.led == 1
    seat.core.take_effects()
    certified = sign_reroot(table.head, PEERS[:2], OWNER)
    chosen = digest_record(certified.result)
    leave_for(seat, table, certified, end=1)
    assert seat.vote is not None and seat.vote.pledge is not None and seat.vote.pledge.digest == chosen
    assert [(one.round, one.base) for one in seat.vote.left] == [(before.round, before.base)]
    assert (seat.core.round, seat.core.attempt, seat.core.head) == (1, 0, table.head)
    seat.core = table.make_core(4, table.head, seat.vote)
    table.hear(seat, certified)
    assert seat.core.head.digest == chosen, "and it knows where it goes after a restart, too"


def test_who_goes_over_signs_nothing_until_it_is_there_and_takes_up_its_record_when_it_comes_back() -> None:
    table = Table(3)
    lead, voter, _ = table.order()
    table.blocked = withhold(Certified)
    table.make_ready()
    table.settle()
    assert voter.vote is not None and voter.vote.accepted is not None
    signed = voter.vote
    certified = sign_reroot(table.head, PEERS[:2], OWNER)
    leave_for(voter, table, certified, end=1)
    voter.core.take_effects()
    voter.core.receive(Prepare(round=1, attempt=1), table.order()[1].peer, table.now)
    said = [effect for effect in voter.core.take_effects() if isinstance(effect, Send)]
    assert said == [], "its promises for this very round are put away"
    # The log that it left has grown heavier after all.
    certificate = lead.committed[0]
    leave_for(voter, table, certificate, end=1)
    assert voter.core.take_effects() is not None
    voter.core = table.make_core(voter.number, table.head, replace(voter.vote, pledge=None))
    core_vote = voter.core._vote
    assert (core_vote.accepted, core_vote.promised, core_vote.led) == (signed.accepted, signed.promised, signed.led)
