"""The round core, driven by hand: an offer that is taken back while no quorum is in sight, and the one after it."""

from dataclasses import replace

from shoal.protocol.effects import Phase, Reduce, Send
from shoal.protocol.messages import Contribution, Plan, contribution_root
from shoal.protocol.round_state import Offer
from tests.unit.protocol.round_table import Seat, Table, members_of, nothing, only_to
from tests.unit.protocol.samples import CROWD_PEERS, PARTS, RULES, make_digests, make_ready

AGAIN = "/again"


def halve(table: Table) -> None:
    """Nobody has a quorum any more; the first half has the proposer of attempt 0."""
    order = table.order()
    table.part(tuple(order[:2]), tuple(order[2:]))


def roots(table: Table, number: int = 1) -> dict[int, bytes]:
    """The contributions that the round was certified with, by peer."""
    return {CROWD_PEERS.index(member.peer): member.contribution_root for member in table.result(number).members}


def root_of(number: int, label: str) -> bytes:
    return contribution_root(make_digests(f"{number}{label}"))


def sit_down() -> Table:
    """A table that begins no exchange without everybody."""
    return Table(4, rules=replace(RULES, peers_min=4))


def plan_and_part(table: Table, *, reduces: bool = False) -> None:
    """Everybody sends its parts by the plan; then the quorum is lost, and the attempt fails. `reduces`: not before the
    first half has made a result of it."""
    table.begin_exchange()
    halve(table)
    table.reduces = reduces
    table.advance(RULES.exchange_timeout_s + 1.0)
    table.reduces = True
    assert {seat.core.phase for seat in table.seats} <= {Phase.GATHER, Phase.PREPARE}


def test_with_a_quorum_in_sight_an_offer_stands() -> None:
    table = Table(4)
    (seat, *_) = table.seats
    table.make_ready(seat)
    assert seat.core.sees_quorum and not seat.core.may_withdraw
    assert seat.core.withdraw(table.now) is None
    assert seat.core.view().ready == (seat.peer,)


def test_where_nothing_is_offered_nothing_is_taken_back() -> None:
    table = Table(4)
    halve(table)
    core = table.seats[0].core
    assert not core.sees_quorum and not core.may_withdraw
    assert core.withdraw(table.now) is None


def test_in_a_plan_an_offer_stands() -> None:
    table = Table(4)
    table.begin_exchange()
    halve(table)
    for seat in table.order()[:2]:
        assert seat.core.phase is Phase.EXCHANGE and not seat.core.sees_quorum
        assert seat.core.withdraw(table.now) is None
    table.heal()
    table.finish_reductions()
    table.run(1)
    assert roots(table) == {number: root_of(number, "/0") for number in range(4)}


def test_what_was_in_no_plan_is_as_if_it_had_not_been_offered() -> None:
    table = Table(4)
    halve(table)
    seat = table.seats[0]
    table.make_ready(seat)
    assert seat.core.may_withdraw and seat.core.withdraw(table.now) is False
    assert seat.core.view().ready == ()
    assert not seat.core.may_withdraw and seat.core.withdraw(table.now) is None, "a second time"


def test_what_was_in_a_plan_may_be_counted_all_the_same() -> None:
    table = sit_down()
    plan_and_part(table, reduces=True)
    for seat in table.seats:
        assert seat.core.withdraw(table.now) is True
        seat.ready = make_ready(seat.number, seat.core.head, label=AGAIN)
        offer = Offer(signed=seat.ready, digests=make_digests(f"{seat.number}{AGAIN}"))
        assert seat.core.offer(offer, table.now)
    # Two have voted for what was planned, and whoever leads next has to propose it again.
    table.heal()
    table.run(1)
    assert roots(table) == {number: root_of(number, "/0") for number in range(4)}


def test_of_two_offers_each_was_in_a_plan_or_was_not() -> None:
    table = Table(4)
    plan_and_part(table)
    for seat in table.seats:
        assert seat.core.withdraw(table.now) is True
    table.make_ready(label=AGAIN)
    for seat in table.seats:
        assert seat.core.withdraw(table.now) is False, "of this one nobody knew while there was a quorum"


def test_a_disk_that_fails_does_not_make_the_plan_forgotten() -> None:
    table = Table(4)
    plan_and_part(table)
    (seat, *_) = table.seats
    seat.core.resume(seat.core._vote, table.now)
    assert seat.core.withdraw(table.now) is True


def test_another_offer_is_taken_only_after_the_first_was_taken_back() -> None:
    table = Table(4)
    halve(table)
    seat = table.seats[0]
    table.make_ready(seat)
    ready = make_ready(seat.number, seat.core.head, label=AGAIN)
    other = Offer(signed=ready, digests=make_digests(f"{seat.number}{AGAIN}"))
    assert not seat.core.offer(other, table.now)
    seat.core.withdraw(table.now)
    assert seat.core.offer(other, table.now)
    assert seat.core.view().ready == (seat.peer,)


def test_the_round_is_certified_with_what_was_offered_last() -> None:
    table = sit_down()
    halve(table)
    table.make_ready()
    for seat in table.seats[:3]:
        assert seat.core.withdraw(table.now) is False
    table.make_ready(*table.seats[:3], label=AGAIN)
    table.heal()
    table.run(1)
    assert roots(table) == {number: root_of(number, AGAIN if number < 3 else "/0") for number in range(4)}
    assert [members_of(table.result(), part) for part in range(PARTS)] == [(0, 1, 2, 3)] * PARTS
    table.make_ready()
    table.run(2)
    assert len(table.result(2).members) == 4, "and the next one as always"


def test_what_was_sent_of_the_old_offer_is_sent_of_the_new_one() -> None:
    table = sit_down()
    plan_and_part(table)
    for seat in table.seats:
        assert seat.core.withdraw(table.now) is True
    table.make_ready(label=AGAIN)
    table.heal()
    table.run(1)
    assert roots(table) == {number: root_of(number, AGAIN) for number in range(4)}
    assert [members_of(table.result(), part) for part in range(PARTS)] == [(0, 1, 2, 3)] * PARTS


def plan_without(table: Table, victim: Seat) -> Send:
    """Everybody but the victim has the plan with it, which is on its way there. The victim sees its proposer only."""
    table.reduces = False
    table.blocked = only_to(Plan, *(seat for seat in table.seats if seat is not victim))
    table.make_ready()
    table.settle()
    table.reduces = True
    lead = table.order()[0]
    (late,) = [one for one in lead.did(Send) if isinstance(one.message, Plan) and one.peer == victim.peer]
    table.blocked = nothing
    for other in table.seats:
        if other not in (lead, victim):
            victim.core.lose(other.peer, table.now)
    return late


def check_late_plan(*, offers_before: bool) -> None:
    table = Table(4)
    lead, victim, *_ = table.order()
    late = plan_without(table, victim)
    assert victim.core.withdraw(table.now) is False, "it knows of no plan"
    if offers_before:
        table.make_ready(victim, label=AGAIN)
    table.deliver(lead, late, victim)
    assert victim.core.phase is Phase.EXCHANGE
    if not offers_before:
        table.make_ready(victim, label=AGAIN)
    table.meet()
    table.finish_reductions()
    table.run(1)
    assert table.attempts() == {0}, "they go on without it, in the attempt that they are in"
    others = tuple(sorted(seat.number for seat in table.seats if seat is not victim))
    assert [members_of(table.result(), part) for part in range(PARTS)] == [others] * PARTS
    # Not even in the parts that it owns: whoever is told that nobody has planned with it has given its bytes away.
    old = set(make_digests(f"{victim.number}/0"))
    assert any(effect.round == 1 for effect in victim.did(Reduce)), "it owns some"
    assert not any(old.intersection(effect.digests) for effect in victim.did(Reduce) if effect.round == 1)
    assert victim.said(Contribution) == []
    table.make_ready()
    table.run(2)
    assert [members_of(table.result(2), part) for part in range(PARTS)] == [(0, 1, 2, 3)] * PARTS


def test_a_plan_with_the_old_offer_that_comes_late_does_no_harm() -> None:
    check_late_plan(offers_before=False)


def test_a_plan_with_the_old_offer_that_comes_after_the_new_one_does_no_harm() -> None:
    check_late_plan(offers_before=True)
