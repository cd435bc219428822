"""The round core, driven by hand: plain rounds, who is waited for, owners and senders that fail, missing bytes."""

from collections import Counter
from dataclasses import replace

import pytest

from shoal.protocol.effects import (
    AttemptFailed,
    FetchBlob,
    PartReassigned,
    Persist,
    Phase,
    Planned,
    SenderMissing,
    SendPart,
    SendResult,
)
from shoal.protocol.errors import Failure
from shoal.protocol.messages import Certified, Contribution, PartDone, Vote, sign_ready
from shoal.protocol.round_state import FETCH_DELAY_S, FETCH_RETRY_S, Offer
from tests.unit.protocol.round_table import Seat, Table, Travelling, cut_off, members_of, withhold
from tests.unit.protocol.samples import PARTS, PEERS, RULES, SWARM, make_digests, make_head, make_presence, make_ready


def sends_of_parts(seat: Seat) -> Counter[int]:
    return Counter(effect.part for effect in seat.did(SendPart))


# -- plain rounds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_a_plain_round_is_certified_by_all_in_the_first_attempt(count: int) -> None:
    table = Table(count)
    table.make_ready()
    table.settle()
    result = table.result()
    assert table.attempts() == {0}
    assert all(members_of(result, part) == tuple(range(count)) for part in range(PARTS))
    assert len({seat.core.head for seat in table.seats}) == 1
    assert table.now == 0.0, "nobody waited for a deadline"


def test_rounds_follow_each_other() -> None:
    table = Table()
    for number in (1, 2, 3):
        table.make_ready()
        table.settle()
        assert table.result(number).round == number
    heads = [seat.committed for seat in table.seats]
    assert heads[0][1].result.previous != heads[0][2].result.previous
    assert all(seat.core.phase is Phase.GATHER for seat in table.seats)


@pytest.mark.parametrize("quorum", ["majority", "two_thirds"])
def test_a_plan_has_the_contributions_codec_and_a_result_the_updates(quorum: str) -> None:
    table = Table(rules=replace(RULES, codec="ternary", update_codec="bf16", quorum=quorum))
    assert table.begin_exchange().codec == "ternary"
    table.finish_reductions()
    table.settle()
    assert table.result().codec == "bf16"


def test_each_part_travels_once_from_each_member_and_each_result_once_to_each() -> None:
    table = Table()
    plan = table.begin_exchange()
    table.finish_reductions()
    for seat in table.seats:
        owned = {part for part in range(PARTS) if plan.owners[part] == seat.number}
        assert sends_of_parts(seat) == {part: 1 for part in range(PARTS) if part not in owned}
        assert len(seat.did(SendResult)) == len(owned) * 3
    table.result()


def test_a_vote_follows_its_record_and_the_bytes_it_stands_for() -> None:
    table = Table()
    table.make_ready()
    table.settle()
    for seat in table.seats:
        assert len(seat.said(Vote)) == 1
        kinds = [type(getattr(effect, "message", effect)) for effect in seat.effects]
        before = seat.effects[kinds.index(Vote) - 1]
        assert isinstance(before, Persist)
        assert before.vote.accepted == table.result()
        assert set(before.digests) == {part.digest for part in table.result().parts}


def test_a_certificate_holds_no_more_votes_than_a_quorum() -> None:
    table = Table(7)
    table.make_ready()
    table.settle()
    assert {len(seat.committed[0].votes) for seat in table.seats} == {4}


def test_one_founder_trains_alone() -> None:
    table = Table(1, rules=replace(RULES, peers_min=1))
    table.make_ready()
    table.settle()
    assert table.result().voters == PEERS[:1]


def test_a_newcomer_contributes_first_and_votes_in_the_next_round() -> None:
    table = Table(3, voters=2)
    table.make_ready(table.seats[2])
    table.make_ready(*table.seats[:2])
    table.settle()
    result = table.result()
    assert members_of(result, 0) == (0, 1, 2)
    assert [len(seat.said(Vote)) for seat in table.seats] == [1, 1, 0]
    assert result.voters == PEERS[:3]
    table.make_ready()
    table.settle()
    assert [len(seat.said(Vote)) for seat in table.seats] == [2, 2, 1]


def test_messages_may_come_twice() -> None:
    table = Table()

    def twice(effect: Travelling, source: Seat, target: Seat) -> bool:
        table.deliver(source, effect, target)
        return False

    table.blocked = twice
    for number in (1, 2):
        table.make_ready()
        table.settle()
        table.result(number)
    assert {len(seat.said(Vote)) for seat in table.seats} == {2}


def test_messages_may_overtake_each_other() -> None:
    table = Table()
    table.newest_first = True
    for number in (1, 2, 3):
        table.make_ready()
        table.run(number)
        table.result(number)
        assert table.attempts(number) == {0}


def test_arrival_order_does_not_change_the_result() -> None:
    results = set()
    for newest_first in (False, True):
        table = Table()
        table.newest_first = newest_first
        table.make_ready()
        table.run(1)
        results.add(table.result())
    assert len(results) == 1


# -- who is waited for ----------------------------------------------------------------------------------------------


def test_a_proposer_waits_for_live_trainers_as_long_as_the_grace_window() -> None:
    table = Table()
    lead, *others = table.order()
    table.make_ready(*others[:2])
    table.advance(RULES.grace_s - 0.01)
    assert lead.did(Planned) == []
    assert set(lead.core.view().waiting_for) == {others[2].peer}, "its own work, too, is not waited for longer"
    table.advance(0.02)
    (planned,) = lead.did(Planned)
    assert set(planned.roster) == {others[0].peer, others[1].peer}
    assert table.result().round == 1


def test_who_becomes_ready_within_the_grace_window_takes_part() -> None:
    table = Table()
    lead, *others = table.order()
    table.make_ready(*others[:2])
    table.advance(RULES.grace_s / 2)
    table.make_ready(others[2], lead)
    table.settle()
    assert members_of(table.result(), 0) == (0, 1, 2, 3)
    assert table.now == RULES.grace_s / 2


def test_too_few_ready_peers_are_not_a_failure() -> None:
    table = Table()
    table.make_ready(table.seats[1])
    table.advance(1000.0)
    assert all(seat.core.next_deadline() is None for seat in table.seats)
    assert all(seat.did(AttemptFailed) == [] for seat in table.seats)


def test_a_peer_that_is_not_ready_neither_takes_part_nor_is_counted() -> None:
    table = Table()
    table.make_ready(*table.seats[:3])
    table.run(1)
    assert members_of(table.result(), 0) == (0, 1, 2)
    assert table.result().voters == PEERS[:4], "a voter that trains on stays one"


@pytest.mark.parametrize("changes", [{"base_root": b"x" * 32}, {"round": 2}])
def test_a_ready_for_another_base_or_round_is_no_ready(changes: dict[str, object]) -> None:
    table = Table()
    lead, other, *_ = table.order()
    signed = make_ready(other.number, table.head)
    stale = sign_ready(other.identity, SWARM, replace(signed.ready, **changes))  # type: ignore[arg-type]
    lead.core.observe(make_presence(other.number, ready=stale), 0.0)
    assert lead.core.view().ready == ()
    lead.core.observe(make_presence(other.number, 2, ready=signed), 0.0)
    assert lead.core.view().ready == (other.peer,)


def test_a_second_contribution_to_the_same_round_is_declined() -> None:
    table = Table()
    seat = table.seats[1]
    table.make_ready(seat)
    offer = Offer(signed=make_ready(1, table.head, label="other"), digests=make_digests("1other"))
    assert not seat.core.offer(offer, 0.0), "a plan may count on the first"
    assert seat.core.view().ready == (seat.peer,)
    with pytest.raises(AssertionError, match="open round"):
        seat.core.offer(replace(offer, signed=make_ready(1, make_head(round_number=1))), 0.0)


# -- owners and senders that fail -----------------------------------------------------------------------------------


def test_the_parts_of_a_dead_owner_and_only_those_are_sent_again() -> None:
    table = Table()
    lead, victim, *others = table.order()
    table.blocked = cut_off(victim)
    table.make_ready()
    table.settle()
    plan = table.plan()
    owned = {part for part in range(PARTS) if plan.owners[part] == victim.number}
    assert owned, "everybody owns something in this plan"
    table.kill(victim)
    table.settle()
    result = table.result()
    assert table.attempts() == {0}, "a death restarts nothing"
    moved = lead.did(PartReassigned)
    assert {effect.part for effect in moved} == owned
    assert {(effect.old_owner, effect.reason) for effect in moved} == {(victim.peer, Failure.OWNER_LOST)}
    new_owner = {effect.part: effect.new_owner for effect in moved}
    for seat in (lead, *others):
        for part, count in sends_of_parts(seat).items():
            assert count == 1 + (part in owned and new_owner[part] != seat.peer)
        assert victim.number not in members_of(result, seat.number)
    assert victim.peer not in result.voters


def test_the_parts_of_a_slow_owner_go_to_another_and_its_late_word_does_nothing() -> None:
    table = Table()
    plan = table.begin_exchange()
    lead, victim, *others = table.order()
    table.finish_reductions(lead, *others)
    table.advance(RULES.sender_timeout_s + RULES.owner_timeout_s + 0.1)
    moved = lead.did(PartReassigned)
    assert {(effect.old_owner, effect.reason) for effect in moved} == {(victim.peer, Failure.OWNER_SLOW)}
    result = table.result()
    assert [members_of(result, part) for part in range(PARTS)] == [(0, 1, 2, 3)] * PARTS, "it is a member as before"
    assert table.attempts() == {0}
    table.finish_reductions(victim)
    assert table.result() == result
    assert plan.owners.count(victim.number) == len(moved)


def test_an_attempt_ends_when_nobody_is_left_to_own_a_part() -> None:
    table = Table()
    lead, owner, *others = table.order()
    table.make_ready(lead, *others, owns=False)
    table.blocked = withhold(PartDone)
    table.make_ready(owner)
    table.settle()
    table.kill(owner)
    table.settle()
    assert [effect.reason for effect in lead.did(AttemptFailed)] == [Failure.EXCHANGE_TIMEOUT]
    assert table.refusals == []


@pytest.mark.parametrize(("dies", "reason"), [(True, Failure.SENDER_LOST), (False, Failure.SENDER_SLOW)])
def test_a_sender_is_absent_from_the_parts_that_it_did_not_deliver(dies: bool, reason: Failure) -> None:
    table = Table()
    _, sender, owner, _ = table.order()
    table.blocked = lambda effect, source, target: isinstance(effect, SendPart) and source is sender and target is owner
    table.make_ready()
    table.settle()
    if dies:
        table.kill(sender)
        table.settle()
    else:
        table.advance(RULES.sender_timeout_s + 0.01)
    plan = table.plan()
    lacking = {part for part in range(PARTS) if plan.owners[part] == owner.number}
    result = table.result()
    for part in range(PARTS):
        assert (sender.number in members_of(result, part)) == (part not in lacking)
    missing = owner.did(SenderMissing)
    assert {(effect.part, effect.peer, effect.reason) for effect in missing} == {
        (part, sender.peer, reason) for part in lacking
    }


def test_a_contribution_other_than_the_signed_one_does_not_count() -> None:
    table = Table()
    liar, *others = table.order()[1:]
    table.blocked = lambda effect, source, target: (
        source is liar and isinstance(getattr(effect, "message", None), Contribution)
    )
    for seat in table.seats:
        if seat is not liar:
            seat.core.receive(Contribution(round=1, digests=make_digests("something else")), liar.peer, 0.0)
    table.make_ready()
    table.advance(RULES.sender_timeout_s)
    for part, owner in enumerate(table.plan().owners):
        expected = set(range(4)) if owner == liar.number else {0, 1, 2, 3} - {liar.number}
        assert set(members_of(table.result(), part)) == expected
    assert others[0].did(SenderMissing)[0].peer == liar.peer


# -- bytes that are missing -----------------------------------------------------------------------------------------


def test_a_voter_fetches_what_it_lacks_before_it_votes() -> None:
    table = Table()
    voter = table.order()[1]
    table.blocked = lambda effect, source, target: (
        target is voter and (isinstance(effect, SendResult) or isinstance(getattr(effect, "message", None), Certified))
    )
    table.make_ready()
    table.settle()
    assert voter.core.phase is Phase.COMMIT and voter.said(Vote) == []
    table.advance(FETCH_DELAY_S)
    fetches = voter.did(FetchBlob)
    plan = table.plan()
    assert {effect.part for effect in fetches} == {p for p in range(PARTS) if plan.owners[p] != voter.number}
    for effect in fetches:
        assert effect.candidates[0] == plan.roster[plan.owners[effect.part]].signed.peer, "its owner is asked first"
        assert voter.peer not in effect.candidates and set(effect.candidates) == set(PEERS[:4]) - {voter.peer}
    assert len(voter.said(Vote)) == 1


def test_who_hears_of_a_certificate_only_fetches_and_applies_it() -> None:
    table = Table()
    victim = table.order()[3]
    table.blocked = lambda effect, source, target: (
        target is victim and not isinstance(getattr(effect, "message", None), Certified)
    )
    table.make_ready(*table.order()[:3])
    table.advance(RULES.grace_s)
    table.run(1)
    assert table.result() == victim.committed[0].result
    assert victim.did(FetchBlob) and victim.said(Vote) == []


def test_what_cannot_be_fetched_is_asked_for_again() -> None:
    table = Table()
    victim = table.order()[3]
    table.blocked = lambda effect, source, target: target is victim and isinstance(effect, SendResult)
    table.blobs_are_found = False
    table.make_ready()
    table.settle()
    table.advance(FETCH_DELAY_S + 2 * FETCH_RETRY_S)
    asked = Counter(effect.part for effect in victim.did(FetchBlob))
    assert set(asked.values()) == {3}
    assert victim.core.phase is Phase.FETCH
