"""The round core, driven by hand: plain rounds, deaths at every step, restarts, leavers, and what must be refused."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from shoal.protocol import rounds as module
from shoal.protocol.effects import (
    AttemptFailed,
    Behind,
    Commit,
    FetchBlob,
    PartReassigned,
    Persist,
    Phase,
    PhaseEntered,
    Planned,
    Reduce,
    SenderMissing,
    SendPart,
    SendResult,
    VoteRecord,
)
from shoal.protocol.errors import Failure, ProtocolError, Refusal
from shoal.protocol.messages import (
    ROUND_MESSAGES,
    Certified,
    Contribution,
    Nack,
    PartDone,
    Plan,
    Prepare,
    Promise,
    Proposal,
    Result,
    Vote,
    sign_message,
)
from shoal.protocol.quorum import Head, list_members, make_bitmap, quorum_size
from tests.unit.protocol.round_table import Seat, Table, Travelling
from tests.unit.protocol.samples import (
    IDENTITIES,
    OTHER_SWARM,
    PARTS,
    PEERS,
    RULES,
    SWARM,
    certify,
    make_digests,
    make_presence,
    make_sample_result,
    make_vote,
)

# -- helpers --------------------------------------------------------------------------------------------------------


def gather(table: Table) -> Table:
    table.meet()
    return table


def begin_exchange(table: Table) -> Plan:
    """Everybody is ready and has the plan; nobody finishes a reduction."""
    finish, table.reduce = table.reduce, lambda seat, effect: None  # type: ignore[method-assign]
    table.meet()
    table.make_ready()
    table.settle()
    table.reduce = finish  # type: ignore[method-assign]
    (plan, *_) = table.order()[0].said(Plan)
    assert isinstance(plan, Plan)
    return plan


def finish_reductions(table: Table, *seats: Seat) -> None:
    """These seats finish every reduction that they began."""
    for seat in seats or tuple(table.up()):
        for effect in seat.did(Reduce):
            assert isinstance(effect, Reduce)
            table.reduce(seat, effect)
    table.settle()


def the_result(table: Table, number: int = 1) -> Result:
    """The one result that everybody who is up has certified in this round."""
    results = {seat.committed[number - 1].result for seat in table.up()}
    assert len(results) == 1
    assert table.refusals == []
    return results.pop()


def attempts(table: Table, number: int = 1) -> set[int]:
    return {seat.committed[number - 1].attempt for seat in table.up()}


def members_of(result: Result, part: int) -> tuple[int, ...]:
    """The peers, as numbers, in a part's bitmap."""
    indices = list_members(result.parts[part].contributors, len(result.members))
    return tuple(PEERS.index(result.members[index].peer) for index in indices)


def sends_of_parts(seat: Seat) -> Counter[int]:
    return Counter(effect.part for effect in seat.did(SendPart) if isinstance(effect, SendPart))


def refusal_of(seat: Seat, message: ROUND_MESSAGES, sender: int, now: float = 0.0) -> Refusal:
    seat.core.take_effects()
    before = seat.core.view()
    with pytest.raises(ProtocolError) as caught:
        seat.core.receive(message, PEERS[sender], now)
    assert seat.core.view() == before, "what is refused changes nothing"
    assert seat.core.take_effects() == []
    return caught.value.refusal


def ignores(seat: Seat, message: ROUND_MESSAGES, sender: int, now: float = 0.0) -> bool:
    seat.core.take_effects()
    before = seat.core.view()
    seat.core.receive(message, PEERS[sender], now)
    return seat.core.view() == before and seat.core.take_effects() == []


def sent_by(kind: type) -> Callable[[Travelling, Seat, Seat], bool]:
    """A filter that holds back messages of this kind."""
    return lambda effect, source, target: isinstance(getattr(effect, "message", effect), kind)


# -- plain rounds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_a_plain_round_is_certified_by_all_in_the_first_attempt(count: int) -> None:
    table = gather(Table(count))
    table.make_ready()
    table.settle()
    result = the_result(table)
    assert attempts(table) == {0}
    assert all(members_of(result, part) == tuple(range(count)) for part in range(PARTS))
    assert len({seat.core.head for seat in table.seats}) == 1
    assert table.now == 0.0, "nobody waited for a deadline"


def test_rounds_follow_each_other() -> None:
    table = gather(Table())
    for number in (1, 2, 3):
        table.make_ready()
        table.settle()
        assert the_result(table, number).round == number
    heads = [seat.committed for seat in table.seats]
    assert heads[0][1].result.previous != heads[0][2].result.previous
    assert all(seat.core.phase is Phase.GATHER for seat in table.seats)


def test_each_part_travels_once_from_each_member_and_each_result_once_to_each() -> None:
    table = gather(Table())
    plan = begin_exchange(table)
    finish_reductions(table)
    for seat in table.seats:
        owned = {part for part in range(PARTS) if plan.owners[part] == seat.number}
        assert sends_of_parts(seat) == {part: 1 for part in range(PARTS) if part not in owned}
        assert len(seat.did(SendResult)) == len(owned) * 3
    the_result(table)


def test_a_vote_follows_its_record_and_the_bytes_it_stands_for() -> None:
    table = gather(Table())
    table.make_ready()
    table.settle()
    for seat in table.seats:
        (vote,) = seat.said(Vote)
        kinds = [type(getattr(effect, "message", effect)) for effect in seat.effects]
        before = seat.effects[kinds.index(Vote) - 1]
        assert isinstance(before, Persist) and isinstance(vote, Vote)
        assert before.vote.accepted == the_result(table)
        assert set(before.digests) == {part.digest for part in the_result(table).parts}


def test_a_certificate_holds_no_more_votes_than_a_quorum() -> None:
    table = gather(Table(7))
    table.make_ready()
    table.settle()
    assert {len(seat.committed[0].votes) for seat in table.seats} == {4}


def test_one_founder_trains_alone() -> None:
    table = gather(Table(1, rules=replace(RULES, peers_min=1)))
    table.make_ready()
    table.settle()
    assert the_result(table).voters == PEERS[:1]


def test_a_newcomer_contributes_first_and_votes_in_the_next_round() -> None:
    table = gather(Table(3, voters=2))
    table.make_ready()
    table.settle()
    result = the_result(table)
    assert members_of(result, 0) == (0, 1, 2)
    assert [len(seat.said(Vote)) for seat in table.seats] == [1, 1, 0]
    assert result.voters == PEERS[:3]
    table.make_ready()
    table.settle()
    assert [len(seat.said(Vote)) for seat in table.seats] == [2, 2, 1]


def test_messages_may_come_twice() -> None:
    table = gather(Table())

    def twice(effect: Travelling, source: Seat, target: Seat) -> bool:
        table.deliver(source, effect, target)
        return False

    table.blocked = twice
    for number in (1, 2):
        table.make_ready()
        table.settle()
        the_result(table, number)
    assert {len(seat.said(Vote)) for seat in table.seats} == {2}


def test_messages_may_overtake_each_other() -> None:
    table = gather(Table())
    table.newest_first = True
    for number in (1, 2, 3):
        table.make_ready()
        table.run(number)
        the_result(table, number)
        assert attempts(table, number) == {0}


def test_arrival_order_does_not_change_the_result() -> None:
    results = set()
    for newest_first in (False, True):
        table = gather(Table())
        table.newest_first = newest_first
        table.make_ready()
        table.run(1)
        results.add(the_result(table))
    assert len(results) == 1


# -- who is waited for ----------------------------------------------------------------------------------------------


def test_a_proposer_waits_for_live_trainers_as_long_as_the_grace_window() -> None:
    table = gather(Table())
    lead, *others = table.order()
    table.make_ready(*others[:2])
    table.advance(RULES.grace_s - 0.01)
    assert lead.did(Planned) == []
    assert set(lead.core.view().waiting_for) == {others[2].peer}, "its own work, too, is not waited for longer"
    table.advance(0.02)
    (planned,) = lead.did(Planned)
    assert isinstance(planned, Planned)
    assert set(planned.roster) == {others[0].peer, others[1].peer}
    assert the_result(table).round == 1


def test_who_becomes_ready_within_the_grace_window_takes_part() -> None:
    table = gather(Table())
    lead, *others = table.order()
    table.make_ready(*others[:2])
    table.advance(RULES.grace_s / 2)
    table.make_ready(others[2], lead)
    table.settle()
    assert members_of(the_result(table), 0) == (0, 1, 2, 3)
    assert table.now == RULES.grace_s / 2


def test_too_few_ready_peers_are_not_a_failure() -> None:
    table = gather(Table())
    table.make_ready(table.seats[1])
    table.advance(1000.0)
    assert all(seat.core.next_deadline() is None for seat in table.seats)
    assert all(seat.did(AttemptFailed) == [] for seat in table.seats)


def test_a_peer_that_is_not_ready_neither_takes_part_nor_is_counted() -> None:
    table = gather(Table())
    table.make_ready(*table.seats[:3])
    table.run(1)
    assert members_of(the_result(table), 0) == (0, 1, 2)
    assert the_result(table).voters == PEERS[:4], "a voter that trains on stays one"


def test_a_ready_for_another_base_or_round_is_no_ready() -> None:
    table = gather(Table())
    lead = table.order()[0]
    for seat in table.seats:
        if seat is not lead:
            stale = make_presence(
                seat.number, 9, ready=replace(make_ready_of(seat, Head(round=0, digest=SWARM, state_root=b"x" * 32, voters=PEERS[:4])))
            )
            lead.core.observe(stale, 0.0)
    assert lead.core.view().ready == ()


def make_ready_of(seat: Seat, head: Head) -> object:
    from tests.unit.protocol.samples import make_ready

    return make_ready(seat.number, head)
