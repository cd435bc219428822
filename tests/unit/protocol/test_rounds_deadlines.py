"""The round core, driven by hand: deadlines of parts by what their owners and senders have shown, and shares."""

from dataclasses import replace

from shoal.protocol.effects import (
    AttemptFailed,
    FetchBlob,
    PartReassigned,
    Phase,
    Reduce,
    SenderMissing,
    SendPart,
    SendResult,
)
from shoal.protocol.errors import Failure
from shoal.protocol.identity import PeerId
from shoal.protocol.manifest import Rounds
from shoal.protocol.messages import Contribution, PartDone, Plan, Vote
from shoal.protocol.pace import LINE_SAMPLES_MIN
from shoal.protocol.round_state import OWNERS_WINDOW, SENDERS_WINDOW
from shoal.protocol.shares import MISSES_TO_SHRINK, MISSES_TO_STOP, PROBATION_ROUNDS
from tests.unit.protocol.round_table import Seat, Table, members_of, nothing, withhold
from tests.unit.protocol.samples import PARTS, PEERS, RULES, make_digests

# No part may be taken from an owner later than this after its last word.
OWNER_S_MAX = RULES.sender_timeout_s + RULES.owner_timeout_s
STEP_S = 0.25


def sit_down(count: int, rules: Rounds = RULES) -> Table:
    """A table that begins no exchange without everybody."""
    return Table(count, rules=replace(rules, peers_min=count))


def begin(table: Table) -> tuple[Seat, Plan]:
    """Everybody has the plan of the open round and every contribution; nobody has finished a reduction."""
    table.reduces = False
    table.make_ready()
    table.settle()
    table.reduces = True
    lead = table.seat(table.seats[0].core.view().proposer)
    return lead, lead.said(Plan)[-1]


def play(table: Table, number: int, *slow: Seat, took_s: float = 0.1) -> tuple[Seat, Plan]:
    """One round in which reductions take `took_s`, and those of the `slow` never end."""
    lead, plan = begin(table)
    end_s = table.now + RULES.exchange_timeout_s
    while any(seat.core.head.round < number for seat in table.up()):
        assert table.now < end_s, table.seats[0].core.view()
        table.advance(took_s)
        table.finish_reductions(*(seat for seat in table.up() if seat not in slow))
    return lead, plan


def owned(plan: Plan, seat: Seat) -> set[int]:
    return {part for part, owner in enumerate(plan.owners) if plan.roster[owner].signed.peer == seat.peer}


def wait_for_move(table: Table, lead: Seat, limit_s: float, count: int = 1) -> float:
    """How long it takes until so many parts have been moved in all."""
    began_s = table.now
    while len(lead.did(PartReassigned)) < count:
        assert table.now - began_s < limit_s, lead.core.view()
        table.advance(STEP_S)
    return table.now - began_s


# -- owners ---------------------------------------------------------------------------------------------------------


def test_an_owner_that_hangs_loses_only_what_it_has_not_done() -> None:
    table = sit_down(2)
    lead, plan = begin(table)
    victim = next(seat for seat in table.seats if seat is not lead)
    table.finish_reductions(lead)
    table.finish_reductions(victim, count=1)
    wait_for_move(table, lead, OWNER_S_MAX + STEP_S)
    first, second = sorted(owned(plan, victim))
    (moved,) = lead.did(PartReassigned)
    assert (moved.part, moved.old_owner, moved.reason) == (second, victim.peer, Failure.OWNER_SLOW)
    assert first in owned(lead.said(Plan)[-1], victim)
    table.finish_reductions(lead)
    assert table.attempts() == {0}
    assert [members_of(table.result(), part) for part in range(PARTS)] == [(0, 1)] * PARTS


def test_an_owner_has_the_time_that_it_has_shown_to_need() -> None:
    waits = {}
    for took_s in (0.05, 1.0):
        table = sit_down(2)
        for number in range(1, 5):
            play(table, number, took_s=took_s)
        lead, _ = begin(table)
        table.finish_reductions(lead)
        before = len(lead.did(PartReassigned))
        assert before == 0
        waits[took_s] = wait_for_move(table, lead, OWNER_S_MAX + STEP_S)
    assert waits[0.05] < OWNER_S_MAX / 2, "a quick one is missed soon"
    assert waits[0.05] < waits[1.0] <= OWNER_S_MAX + STEP_S


def test_an_owner_whose_parts_stay_is_not_given_more_time_by_those_that_move() -> None:
    table = sit_down(4)
    for number in range(1, 7):
        begin(table)
        slowest = table.seats[3]
        table.advance(0.55)
        table.finish_reductions(*table.seats[:3])
        table.advance(0.45)
        table.finish_reductions(slowest)
        assert slowest.core.head.round == number
    lead, _ = begin(table)
    quick = next(seat for seat in table.seats[:3] if seat is not lead)
    hung = [seat for seat in (quick, table.seats[3]) if seat is not lead]
    table.finish_reductions(*(seat for seat in table.seats if seat not in hung))
    began_s = table.now
    moved_s: dict[PeerId, float] = {}
    while len(moved_s) < len(hung):
        assert table.now - began_s < 2 * OWNER_S_MAX
        table.advance(STEP_S)
        table.finish_reductions(*(seat for seat in table.seats if seat not in hung))
        for effect in lead.did(PartReassigned):
            moved_s.setdefault(effect.old_owner, table.now - began_s)
    assert moved_s[quick.peer] < OWNER_S_MAX / 2
    # The slower one may have been given a part of the quick one's then, and has its time for that.
    assert max(moved_s.values()) <= moved_s[quick.peer] + OWNER_S_MAX - RULES.sender_timeout_s + 1.0


def test_an_owner_that_goes_on_and_on_leaves_time_for_another_one() -> None:
    table = sit_down(2, replace(RULES, owner_timeout_s=8.0))
    lead, plan = begin(table)
    victim = next(seat for seat in table.seats if seat is not lead)
    table.finish_reductions(lead)
    table.advance(7.0)
    table.finish_reductions(victim, count=1)
    wait_for_move(table, lead, 8.0)
    rush_s = OWNERS_WINDOW * RULES.exchange_timeout_s
    assert table.now <= rush_s + STEP_S, "although it was heard not long ago"
    assert {effect.part for effect in lead.did(PartReassigned)} == {max(owned(plan, victim))}
    table.finish_reductions(lead)
    assert table.attempts() == {0}


def test_two_owners_may_hang_one_after_the_other() -> None:
    table = sit_down(4)
    lead, _ = begin(table)
    hung = [seat for seat in table.seats if seat is not lead][:2]
    able = [seat for seat in table.seats if seat not in hung]
    table.finish_reductions(*able)
    end_s = table.now + RULES.exchange_timeout_s
    while lead.core.phase is Phase.EXCHANGE and table.now < end_s:
        table.advance(STEP_S)
        table.finish_reductions(*able)
    assert {effect.old_owner for effect in lead.did(PartReassigned)} == {seat.peer for seat in hung}
    assert all(effect.new_owner not in {seat.peer for seat in hung} for effect in lead.did(PartReassigned))
    assert table.attempts() == {0}


# -- senders --------------------------------------------------------------------------------------------------------


def hold_parts(table: Table, sender: Seat) -> list[SendPart]:
    """What this sender sends travels no further; the parts in the order in which they left."""
    table.blocked = lambda effect, source, target: source is sender and isinstance(effect, SendPart)
    begin(table)
    return [effect for effect in sender.did(SendPart) if effect.round == sender.core.round]


def test_a_sender_is_not_given_up_while_it_delivers() -> None:
    table = sit_down(2)
    sender = table.order()[1]
    owner = table.order()[0]
    for effect in hold_parts(table, sender):
        table.advance(RULES.sender_timeout_s - 0.25)
        table.deliver(sender, effect, owner)
        table.settle()
    table.finish_reductions()
    assert owner.did(SenderMissing) == []
    assert [members_of(table.result(), part) for part in range(PARTS)] == [(0, 1)] * PARTS
    assert table.attempts() == {0}


def test_a_sender_that_goes_on_and_on_is_cut_off() -> None:
    table = sit_down(2)
    owner, sender = table.order()
    first, second = hold_parts(table, sender)
    digests = make_digests(f"{sender.number}/0")
    cut_s = SENDERS_WINDOW * RULES.exchange_timeout_s
    table.advance(1.0)
    table.deliver(sender, first, owner)
    while table.now < cut_s - 0.5:
        table.advance(0.5)
        owner.core.receive(Contribution(round=1, digests=digests), sender.peer, table.now)
    assert owner.did(SenderMissing) == [], "it was heard all the time"
    table.advance(0.6)
    assert [(one.part, one.peer, one.reason) for one in owner.did(SenderMissing)] == [
        (second.part, sender.peer, Failure.SENDER_SLOW)
    ]
    table.finish_reductions()
    result = table.result()
    for part in range(PARTS):
        assert (sender.number in members_of(result, part)) == (part != second.part)
    assert table.attempts() == {0}


def test_a_quick_sender_that_falls_silent_is_missed_soon() -> None:
    table = sit_down(2)
    for number in range(1, 5):
        play(table, number)
    began_s = table.now
    lead = table.seat(table.seats[0].core.view().proposer)
    owner, sender = lead, next(seat for seat in table.seats if seat is not lead)
    hold_parts(table, sender)
    table.advance(RULES.sender_timeout_s / 2)
    assert {one.reason for one in owner.did(SenderMissing)} == {Failure.SENDER_SLOW}
    assert table.now - began_s < RULES.sender_timeout_s


def test_owners_that_wait_for_a_slow_sender_are_not_slow_themselves() -> None:
    table = sit_down(4)
    for number in range(1, 4):
        play(table, number)
    lead = table.seat(table.seats[0].core.view().proposer)
    sender = next(seat for seat in table.seats if seat is not lead)
    hold_parts(table, sender)
    end_s = table.now + RULES.exchange_timeout_s
    while any(seat.core.head.round < 4 for seat in table.seats):
        assert table.now < end_s, lead.core.view()
        table.advance(STEP_S)
        table.finish_reductions()
    assert all(seat.did(PartReassigned) == [] and seat.did(AttemptFailed) == [] for seat in table.seats)


# -- shares ---------------------------------------------------------------------------------------------------------


def test_an_owner_that_misses_again_and_again_owns_less_and_then_nothing_and_still_contributes() -> None:
    table = sit_down(2)
    victim = table.seats[1]
    counts = []
    for number in range(1, MISSES_TO_STOP + 1):
        _, plan = play(table, number, victim)
        counts.append(len(owned(plan, victim)))
    assert counts == [2] * MISSES_TO_SHRINK + [1]
    stopped_at = MISSES_TO_STOP
    for number in range(stopped_at + 1, stopped_at + PROBATION_ROUNDS + 1):
        _, plan = play(table, number)
        assert owned(plan, victim) == set()
        assert all(victim.number in members_of(table.result(number), part) for part in range(PARTS))
    _, plan = play(table, stopped_at + PROBATION_ROUNDS + 1)
    assert len(owned(plan, victim)) == 1, "another chance, with a small share"
    plans = [play(table, stopped_at + PROBATION_ROUNDS + number)[1] for number in range(2, 8)]
    counts = [len(owned(plan, victim)) for plan in plans]
    assert set(counts[:-1]) <= {1, 2} and counts[-1] == 2, "when it leads it gives itself what the other gave it last"


def test_who_is_slow_at_sending_owns_less_from_its_first_part_on_and_still_contributes() -> None:
    table = sit_down(4)
    victim = table.seats[2]
    for seat in table.seats:
        for other in table.seats:
            for _ in range(LINE_SAMPLES_MIN):
                seat.core._sender_pace.note_part(other.peer, 5.0 if other is victim else 0.1)
    for number in range(1, 6):
        lead, plan = play(table, number)
        assert lead is victim or owned(plan, victim) == set()
        assert all(victim.number in members_of(table.result(number), part) for part in range(PARTS))
        for seat in table.seats:  # the parts of this table take no time
            seat.core._sender_pace.note_part(victim.peer, 5.0)


def test_a_proposer_gives_itself_what_another_proposer_gave_it() -> None:
    table = sit_down(4)
    victim = table.seats[2]
    for seat in table.seats:
        if seat is not victim:
            for other in table.seats:
                seat.core._owner_pace.note_part(other.peer, 5.0 if other is victim else 0.1)
    led = 0
    for number in range(1, 13):
        lead, plan = play(table, number)
        assert number == 1 or owned(plan, victim) == set(), "it cannot measure itself"
        led += lead is victim
        for seat in table.seats:  # what is known of it does not grow old here
            if seat is not victim:
                seat.core._owner_pace.note_part(victim.peer, 5.0)
    assert led > 0


def test_a_proposer_whose_own_parts_came_late_to_the_voters_gives_itself_none() -> None:
    table = sit_down(3)
    lead, plan = begin(table)
    assert owned(plan, lead)
    table.blocked = withhold(Vote)
    table.finish_reductions()
    table.settle()
    assert lead.core.phase is Phase.COMMIT
    table.advance(0.6 * RULES.commit_timeout_s)
    table.blocked = nothing
    for seat in table.seats:
        for vote in seat.said(Vote)[-1:]:
            lead.core.receive(vote, seat.peer, table.now)
    table.settle()
    assert lead.core.head.round == 1 and lead.core._given_share == 0.0
    others = [seat for seat in table.seats if seat is not lead]
    assert all(seat.core._given_share == 1.0 for seat in others)


def test_who_was_given_a_part_late_keeps_it_while_its_slowest_sender_may_be_at_work() -> None:
    table = sit_down(4, replace(RULES, owner_timeout_s=10.0))
    lead, plan = begin(table)
    victim = next(seat for seat in table.seats if seat is not lead and owned(plan, seat))
    rush_s = OWNERS_WINDOW * RULES.exchange_timeout_s
    table.finish_reductions(*(seat for seat in table.seats if seat is not victim))
    while not lead.did(PartReassigned):
        table.advance(STEP_S)
    assert rush_s - 1.0 < table.now < rush_s, "the case"
    while table.now < rush_s + STEP_S:
        table.advance(STEP_S)
    assert len(lead.did(PartReassigned)) == len(owned(plan, victim)), "nothing is moved twice"


def test_every_member_learns_of_misses_whoever_leads_next() -> None:
    table = sit_down(4)
    victim = table.seats[2]
    leads = set()
    for number in range(1, MISSES_TO_STOP + 1):
        lead, plan = play(table, number, victim)
        leads.add(lead.number)
    assert {seat.core._shares.share(victim.peer) for seat in table.seats} == {0.0}
    others = [seat.core._shares.share(peer) for seat in table.seats for peer in PEERS[:4] if peer != victim.peer]
    assert set(others) == {1.0}
    for number in range(MISSES_TO_STOP + 1, MISSES_TO_STOP + 6):
        lead, plan = play(table, number)
        leads.add(lead.number)
        assert owned(plan, victim) == set()
    assert len(leads) > 1


def test_an_owner_that_dies_has_not_missed_a_deadline() -> None:
    table = sit_down(4)
    lead, _ = begin(table)
    victim = next(seat for seat in table.seats if seat is not lead)
    table.kill(victim)
    table.finish_reductions()
    table.settle()
    table.result()
    assert {effect.reason for effect in lead.did(PartReassigned)} == {Failure.OWNER_LOST}
    assert all(seat.core._shares.share(victim.peer) == 1.0 for seat in table.up())


def test_bytes_of_a_reduction_that_ends_after_its_attempt_are_held_all_the_same() -> None:
    """Another attempt comes to the same bytes, and whoever serves them sees that they are here already."""
    table = sit_down(2)
    lead, _ = begin(table)
    late = next(seat for seat in table.seats if seat is not lead)
    table.reduces = False
    while late.core.attempt == 0 or late.core.phase is not Phase.EXCHANGE:
        assert table.now < 2 * RULES.exchange_timeout_s, late.core.view()
        table.advance(STEP_S)
    given_back = owned(late.said(Plan)[-1], lead)
    stale = [one for one in late.did(Reduce) if one.attempt == 0 and one.part in given_back]
    assert stale and late.core.attempt == 1
    for effect in stale:
        table._reduce(late, effect)
    assert not late.said(PartDone), "nobody is told of an attempt that is over"
    table.blocked = lambda effect, source, target: isinstance(effect, SendResult) and target is late
    table.blobs_are_found = False
    for seat in (lead, late):
        for effect in [one for one in seat.did(Reduce) if one.attempt == 1]:
            table._reduce(seat, effect)
    table.settle()
    assert table.attempts() == {1}
    assert not late.did(FetchBlob)
