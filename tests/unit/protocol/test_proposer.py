"""The proposer's steps: what it must propose again, its plan, its revisions, and how a member checks them."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from shoal.protocol.attendance import FRESHNESS, PARTICIPATION, WORK, Attendance
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import (
    ROSTER_MAX,
    PartDone,
    Plan,
    Promise,
    Result,
    SignedReady,
    digest_roster,
)
from shoal.protocol.proposer import (
    check_plan,
    choose_accepted,
    choose_owner,
    choose_roster,
    list_weights,
    make_empty_result,
    make_plan,
    make_result,
    revise_plan,
)
from shoal.protocol.quorum import check_result, list_members, make_bitmap, owner_order
from tests.unit.protocol.samples import (
    OTHER_SWARM,
    PARTS,
    PEERS,
    SWARM,
    make_head,
    make_ready,
    make_sample_result,
)

HEAD = make_head()


def make_sample_plan(members: int = 4, dial_only: tuple[int, ...] = (), parts: int = PARTS) -> Plan:
    ready = {PEERS[number]: make_ready(number, HEAD, owns=number not in dial_only) for number in range(members)}
    plan = make_plan(HEAD, 0, "int8", ready, parts, {})
    assert plan is not None
    return plan


PLAN = make_sample_plan()


def promise(attempt: int, accepted: Result | None) -> Promise:
    return Promise(round=1, attempt=9, accepted_attempt=attempt, accepted=accepted)


def done(part: int, contributors: set[int], digest: bytes = b"d") -> PartDone:
    bitmap = make_bitmap(frozenset(contributors), 4)
    return PartDone(
        round=1, attempt=0, roster_digest=digest_roster(PLAN.roster), part=part, digest=digest * 32, contributors=bitmap
    )


# -- taking over ----------------------------------------------------------------------------------------------------


def test_a_new_proposer_takes_up_the_result_of_the_highest_attempt() -> None:
    old, new = (make_sample_result(HEAD, label=label) for label in ("old", "new"))
    promises = {PEERS[0]: promise(2, old), PEERS[1]: promise(5, new), PEERS[2]: promise(0, None)}
    assert choose_accepted(promises) == promises[PEERS[1]]
    assert choose_accepted({PEERS[0]: promise(0, old), PEERS[2]: promise(0, None)}) == promise(0, old)


def test_a_new_proposer_is_free_when_nobody_has_voted() -> None:
    assert choose_accepted({PEERS[0]: promise(0, None), PEERS[1]: promise(0, None)}) is None


# -- the plan -------------------------------------------------------------------------------------------------------


def test_a_plan_lists_its_members_by_their_ids_with_the_weights_of_their_readies() -> None:
    assert [entry.signed.peer for entry in PLAN.roster] == list(PEERS[:4])
    assert sum(entry.weight for entry in PLAN.roster) == pytest.approx(1.0)
    heavy = make_plan(
        HEAD,
        0,
        "int8",
        {PEERS[n]: make_ready(n, HEAD, tokens=tokens) for n, tokens in enumerate((100, 141))},
        PARTS,
        {},
    )
    assert heavy is not None
    assert heavy.roster[1].weight == pytest.approx(2 * heavy.roster[0].weight, rel=0.01), "tokens squared"
    assert (PLAN.round, PLAN.previous, PLAN.base_root) == (1, HEAD.digest, HEAD.state_root)
    check_plan(PLAN, HEAD, "int8", PARTS, SWARM)


def test_parts_are_spread_over_those_who_can_be_dialled() -> None:
    plan = make_sample_plan(dial_only=(1,), parts=9)
    assert {plan.owners.count(index) for index in (0, 2, 3)} == {3}
    assert 1 not in plan.owners
    check_plan(plan, HEAD, "int8", 9, SWARM)


def test_nothing_is_planned_while_nobody_can_own_a_part() -> None:
    ready = {PEERS[number]: make_ready(number, HEAD, owns=False) for number in range(2)}
    assert make_plan(HEAD, 0, "int8", ready, PARTS, {}) is None


def test_a_roster_is_bounded() -> None:
    many = {PeerId(bytes([number]) * 32): make_ready(0, HEAD) for number in range(ROSTER_MAX + 6)}
    assert len(choose_roster(many, frozenset(many), HEAD, newcomers_max=8)) == ROSTER_MAX


def test_newcomers_come_in_so_many_a_round_and_each_in_its_turn() -> None:
    ready = {peer: make_ready(0, HEAD) for peer in PEERS}
    known = frozenset(PEERS[:3])
    first = choose_roster(ready, known, HEAD, newcomers_max=2)
    assert len(first) == 5 and known < set(first) and list(first) == sorted(first)
    heads = [replace(HEAD, digest=bytes([number]) * 32) for number in range(20)]
    assert set().union(*(choose_roster(ready, known, head, newcomers_max=1) for head in heads)) == set(PEERS)


def test_a_peer_that_kept_missing_its_deadlines_is_given_fewer_parts_or_none() -> None:
    ready = {PEERS[number]: make_ready(number, HEAD) for number in range(3)}
    plan = make_plan(HEAD, 0, "int8", ready, 90, {PEERS[0]: 0.25, PEERS[1]: 0.0})
    assert plan is not None
    assert [plan.owners.count(index) for index in range(3)] == [18, 0, 72]
    nobody = make_plan(HEAD, 0, "int8", ready, 90, dict.fromkeys(PEERS, 0.0))
    assert nobody is not None and {nobody.owners.count(index) for index in range(3)} == {30}


def test_weights_are_float32_values_that_any_member_computes_alike() -> None:
    roster = tuple(make_ready(number, HEAD, tokens=1 + 37 * number) for number in range(6))
    assert list_weights(roster, WORK) == list_weights(roster, WORK)
    assert all(weight > 0 for weight in list_weights(roster, WORK))


@pytest.mark.parametrize(
    ("spoil", "refusal"),
    [
        (lambda plan: replace(plan, previous=b"x" * 32), Refusal.OTHER_LOG),
        (lambda plan: replace(plan, base_root=b"x" * 32), Refusal.OTHER_LOG),
        (lambda plan: replace(plan, codec="fp32"), Refusal.NOT_PLANNED),
        (lambda plan: replace(plan, owners=plan.owners[:-1]), Refusal.WRONG_LENGTH),
        (lambda plan: replace(plan, owners=(*plan.owners, 0)), Refusal.WRONG_LENGTH),
        (lambda plan: replace(plan, roster=plan.roster[::-1]), Refusal.NON_CANONICAL),
        (lambda plan: replace(plan, roster=(plan.roster[0], *plan.roster)), Refusal.NON_CANONICAL),
        (lambda plan: replace(plan, owners=(4, *plan.owners[1:])), Refusal.OUT_OF_RANGE),
        (
            lambda plan: replace(plan, roster=(replace(plan.roster[0], weight=0.9), *plan.roster[1:])),
            Refusal.OUT_OF_RANGE,
        ),
        (lambda plan: replace(plan, roster=plan.roster[:3], owners=(0,) * PARTS), Refusal.OUT_OF_RANGE),
    ],
)
def test_a_plan_that_does_not_follow_is_refused(spoil: Callable[[Plan], Plan], refusal: Refusal) -> None:
    with pytest.raises(ProtocolError) as caught:
        check_plan(spoil(PLAN), HEAD, "int8", PARTS, SWARM)
    assert caught.value.refusal is refusal


def with_ready(signed: SignedReady) -> Plan:
    roster = tuple(
        replace(entry, signed=signed) if entry.signed.peer == signed.peer else entry for entry in PLAN.roster
    )
    return replace(PLAN, roster=roster)


@pytest.mark.parametrize(
    ("signed", "refusal"),
    [
        (make_ready(1, make_head(round_number=1)), Refusal.WRONG_BASE),  # stale or early: of another round
        (make_ready(1, replace(HEAD, state_root=b"x" * 32)), Refusal.WRONG_BASE),
        (make_ready(1, HEAD, swarm=OTHER_SWARM), Refusal.BAD_SIGNATURE),
        (replace(make_ready(1, HEAD), signature=make_ready(2, HEAD).signature), Refusal.BAD_SIGNATURE),
    ],
)
def test_a_plan_with_a_ready_that_does_not_count_is_refused(signed: SignedReady, refusal: Refusal) -> None:
    with pytest.raises(ProtocolError) as caught:
        check_plan(with_ready(signed), HEAD, "int8", PARTS, SWARM)
    assert caught.value.refusal is refusal


@pytest.mark.parametrize(
    ("rule", "declared"),
    [
        (PARTICIPATION, Attendance(intervals=2, interval_rounds=5)),
        (FRESHNESS, Attendance(base_age=8)),
    ],
)
def test_what_the_manifest_weighs_by_goes_into_plan_and_result(rule: str, declared: Attendance) -> None:
    head = make_head(round_number=9)
    ready = {PEERS[number]: make_ready(number, head) for number in (0, 1)}
    ready[PEERS[2]] = make_ready(2, head, attendance=declared)
    plan = make_plan(head, 0, "int8", ready, PARTS, {}, rule)
    assert plan is not None
    check_plan(plan, head, "int8", PARTS, SWARM, rule)
    weights = {entry.signed.peer: entry.weight for entry in plan.roster}
    assert weights[PEERS[0]] == weights[PEERS[1]]
    # 2.5 is more than two medians.
    factor = 1 / 3 if rule == FRESHNESS else 2.0
    assert weights[PEERS[2]] == pytest.approx(factor * weights[PEERS[0]], rel=1e-6)
    other = FRESHNESS if rule == PARTICIPATION else PARTICIPATION
    for wrong in (WORK, other):
        with pytest.raises(ProtocolError, match="declared where weights go by") as caught:
            check_plan(plan, head, "int8", PARTS, SWARM, wrong)
        assert caught.value.refusal is Refusal.OUT_OF_RANGE
    words = {part: done(part, {0, 1, 2}) for part in range(PARTS)}
    result = make_result(plan, words, head, "int8", frozenset(), 31)
    assert [member.attendance for member in result.members] == [one.signed.ready.attendance for one in plan.roster]


def test_a_plan_whose_weights_leave_out_what_was_declared_is_refused() -> None:
    head = make_head(round_number=9)
    declared = Attendance(intervals=2, interval_rounds=5)
    ready = {PEERS[number]: make_ready(number, head) for number in (0, 1)}
    ready[PEERS[2]] = make_ready(2, head, attendance=declared)
    plan = make_plan(head, 0, "int8", ready, PARTS, {}, PARTICIPATION)
    assert plan is not None and max(entry.weight for entry in plan.roster) == 0.5, "two medians, though it declares 2.5"
    even = replace(plan, roster=tuple(replace(entry, weight=float(np.float32(1 / 3))) for entry in plan.roster))
    with pytest.raises(ProtocolError, match="do not follow from its READYs"):
        check_plan(even, head, "int8", PARTS, SWARM, PARTICIPATION)


def test_a_part_for_a_peer_that_nobody_can_dial_is_refused() -> None:
    plan = make_sample_plan(dial_only=(2,))
    with pytest.raises(ProtocolError, match="roster index 2, which owns nothing") as caught:
        check_plan(replace(plan, owners=(2,) * PARTS), HEAD, "int8", PARTS, SWARM)
    assert caught.value.refusal is Refusal.OUT_OF_RANGE


# -- revisions ------------------------------------------------------------------------------------------------------


def test_the_next_owner_is_the_first_that_is_alive_and_was_not_tried() -> None:
    order = owner_order(HEAD.digest, 2, PEERS[:4])
    assert choose_owner(PLAN, 2, [], frozenset()) == PEERS.index(order[0])
    assert choose_owner(PLAN, 2, [order[0]], frozenset()) == PEERS.index(order[1])
    assert choose_owner(PLAN, 2, [order[0]], frozenset({order[1]})) == PEERS.index(order[2])
    assert choose_owner(PLAN, 2, list(order), frozenset()) is None
    assert choose_owner(PLAN, 2, [], frozenset(PEERS)) is None


def test_a_peer_that_nobody_can_dial_takes_over_nothing() -> None:
    plan = make_sample_plan(dial_only=(0, 1, 3))
    assert choose_owner(plan, 0, [], frozenset()) == 2
    assert choose_owner(plan, 0, [PEERS[2]], frozenset()) is None


def test_a_revision_changes_owners_and_nothing_else() -> None:
    owner = (PLAN.owners[1] + 1) % 4
    revised = revise_plan(replace(PLAN, signature=b"s" * 64), {1: owner})
    assert revised.owners == (PLAN.owners[0], owner, *PLAN.owners[2:])
    assert revised.signature == bytes(64), "it is signed anew"
    assert replace(revised, owners=PLAN.owners, revision=0, signature=PLAN.signature) == PLAN
    assert revised.revision == 1


# -- results --------------------------------------------------------------------------------------------------------


def test_a_result_is_made_of_what_the_owners_said() -> None:
    parts = {3: done(3, {0}), 0: done(0, {0, 1}, b"e"), 1: done(1, {0}), 2: done(2, {1})}
    result = make_result(PLAN, parts, HEAD, "bf16", frozenset(), 31)
    check_result(result, HEAD, PARTS)
    assert [part.digest[:1] for part in result.parts] == [b"e", b"d", b"d", b"d"]
    assert list_members(result.parts[0].contributors, 4) == (0, 1)
    assert result.codec == "bf16", "that of updates, whatever contributions come in"
    assert [member.peer for member in result.members] == list(PEERS[:4])
    assert [member.weight for member in result.members] == [entry.weight for entry in PLAN.roster]


def test_who_contributed_becomes_a_voter_and_who_is_absent_is_none() -> None:
    head = make_head(voters=2)
    parts = {part: done(part, {0, 3}) for part in range(PARTS)}
    assert make_result(PLAN, parts, head, "int8", frozenset(), 31).voters == (PEERS[0], PEERS[1], PEERS[3])
    assert make_result(PLAN, parts, head, "int8", frozenset({PEERS[1]}), 31).voters == (PEERS[0], PEERS[3])


def test_an_empty_result_drops_who_leaves() -> None:
    result = make_empty_result(HEAD, "int8", frozenset({PEERS[1]}))
    assert result is not None
    check_result(result, HEAD, PARTS)
    assert result.voters == (PEERS[0], PEERS[2], PEERS[3])
    assert (result.members, result.parts) == ((), ())


def test_no_empty_result_without_a_reason_or_without_voters() -> None:
    assert make_empty_result(HEAD, "int8", frozenset()) is None
    assert make_empty_result(HEAD, "int8", frozenset({PEERS[7]})) is None
    assert make_empty_result(HEAD, "int8", frozenset(PEERS)) is None
