"""What a peer holds of the others' contributions, and whom it no longer waits for."""

import pytest

from shoal.protocol import exchange as module
from shoal.protocol.errors import Failure, ProtocolError, Refusal
from shoal.protocol.exchange import (
    CONTRIBUTIONS_MAX,
    Inbox,
    Missing,
    Waits,
    list_missing,
    list_undelivered,
)
from shoal.protocol.messages import Plan, contribution_root
from shoal.protocol.proposer import make_plan
from tests.unit.protocol.samples import PARTS, PEERS, make_digests, make_head, make_ready

HEAD = make_head()
SILENCE_MAX_S = 3.0
DIGESTS = [make_digests(f"{number}") for number in range(4)]
OTHER = make_digests("another contribution of the same peer")


@pytest.fixture
def plan() -> Plan:
    made = make_plan(HEAD, 0, "int8", {PEERS[number]: make_ready(number, HEAD) for number in range(4)}, PARTS, {})
    assert made is not None
    return made


@pytest.fixture
def inbox() -> Inbox:
    return Inbox(parts=PARTS)


def deliver(inbox: Inbox, number: int, part: int, now: float = 0.0) -> None:
    inbox.take_digests(PEERS[number], DIGESTS[number], now)
    inbox.take_part(PEERS[number], part, DIGESTS[number][part], now)


@pytest.mark.parametrize("parts", [0, PARTS - 1, PARTS + 1])
def test_a_contribution_of_another_length_is_refused(inbox: Inbox, parts: int) -> None:
    with pytest.raises(ProtocolError, match=f"{parts} parts, not {PARTS}") as caught:
        inbox.take_digests(PEERS[1], make_digests("x", parts), 0.0)
    assert caught.value.refusal is Refusal.WRONG_LENGTH
    assert inbox.digests == {}


def test_a_part_is_checked_before_it_is_read(inbox: Inbox) -> None:
    assert inbox.check_part(PEERS[1], PARTS, DIGESTS[1][0]) is Refusal.OUT_OF_RANGE
    assert inbox.check_part(PEERS[1], 0, OTHER[0]) is None, "before its digests are known it may be anything"
    inbox.take_digests(PEERS[1], DIGESTS[1], 0.0)
    assert inbox.check_part(PEERS[1], 0, OTHER[0]) is Refusal.WRONG_DIGEST
    assert inbox.check_part(PEERS[1], 1, DIGESTS[1][0]) is Refusal.WRONG_DIGEST
    assert inbox.check_part(PEERS[1], 0, DIGESTS[1][0]) is None
    inbox.take_part(PEERS[1], 0, DIGESTS[1][0], 0.0)
    assert inbox.check_part(PEERS[1], 0, DIGESTS[1][0]) is Refusal.DUPLICATE
    assert inbox.check_part(PEERS[1], 1, DIGESTS[1][1]) is None


def test_the_senders_of_parts_are_bounded(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SENDERS_MAX", 2)
    for number in (0, 1):
        inbox.take_part(PEERS[number], 0, DIGESTS[number][0], 0.0)
    assert inbox.check_part(PEERS[2], 0, DIGESTS[2][0]) is Refusal.LIMIT
    assert inbox.check_part(PEERS[1], 1, DIGESTS[1][1]) is None


def test_open_contributions_are_bounded_and_strangers_make_room(inbox: Inbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SENDERS_MAX", 3)
    expected = frozenset({PEERS[0], PEERS[3]})
    for number, now in ((0, 1.0), (2, 2.0), (1, 3.0)):
        inbox.take_digests(PEERS[number], DIGESTS[number], now, expected)
    inbox.take_digests(PEERS[1], OTHER, 4.0, expected)
    inbox.take_digests(PEERS[3], DIGESTS[3], 5.0, expected)
    assert set(inbox.digests) == {PEERS[0], PEERS[1], PEERS[3]}, "the stranger that was silent for longest"
    with pytest.raises(ProtocolError) as caught:
        inbox.take_digests(PEERS[4], OTHER, 6.0, frozenset(PEERS))
    assert caught.value.refusal is Refusal.LIMIT
    assert len(inbox.digests) == 3


def test_a_sender_cannot_fill_the_memory_with_other_versions_of_a_part(inbox: Inbox) -> None:
    versions = [make_digests(f"version {number}") for number in range(CONTRIBUTIONS_MAX + 1)]
    for digests in versions[:-1]:
        assert inbox.check_part(PEERS[1], 0, digests[0]) is None
        inbox.take_part(PEERS[1], 0, digests[0], 0.0)
        inbox.take_part(PEERS[1], 0, digests[0], 0.0)
    assert inbox.check_part(PEERS[1], 0, versions[-1][0]) is Refusal.LIMIT
    inbox.take_digests(PEERS[1], versions[-1], 0.0)
    assert inbox.check_part(PEERS[1], 0, versions[-1][0]) is Refusal.LIMIT
    assert inbox.check_part(PEERS[1], 1, versions[-1][1]) is None


def test_a_part_counts_only_under_the_signed_root(inbox: Inbox) -> None:
    root, other_root = contribution_root(DIGESTS[1]), contribution_root(OTHER)
    inbox.take_part(PEERS[1], 0, DIGESTS[1][0], 0.0)
    assert not inbox.has_part(PEERS[1], 0, root), "the digests behind the root are not known yet"
    inbox.take_digests(PEERS[1], DIGESTS[1], 0.0)
    assert inbox.has_part(PEERS[1], 0, root)
    assert not inbox.has_part(PEERS[1], 1, root)
    assert not inbox.has_part(PEERS[1], 0, other_root)


def test_a_second_contribution_replaces_the_first(inbox: Inbox) -> None:
    deliver(inbox, 1, 0)
    inbox.take_digests(PEERS[1], OTHER, 0.0)
    assert not inbox.has_part(PEERS[1], 0, contribution_root(DIGESTS[1]))
    assert not inbox.has_part(PEERS[1], 0, contribution_root(OTHER)), "its part has not come yet"
    inbox.take_part(PEERS[1], 0, OTHER[0], 0.0)
    assert inbox.has_part(PEERS[1], 0, contribution_root(OTHER))


def test_who_has_not_delivered_is_listed_in_roster_order_however_parts_came(inbox: Inbox, plan: Plan) -> None:
    for number in (3, 0):
        deliver(inbox, number, 1)
    assert list_undelivered(plan, 1, inbox) == (1, 2)
    assert list_undelivered(plan, 0, inbox) == (0, 1, 2, 3)


def test_a_contribution_that_the_plan_does_not_know_is_not_delivered(inbox: Inbox, plan: Plan) -> None:
    inbox.take_digests(PEERS[1], OTHER, 0.0)
    inbox.take_part(PEERS[1], 0, OTHER[0], 0.0)
    assert list_undelivered(plan, 0, inbox) == (0, 1, 2, 3)


def test_parts_are_to_be_looked_at_again_when_bytes_or_digests_came(inbox: Inbox) -> None:
    assert inbox.touched == set()
    inbox.take_part(PEERS[1], 2, DIGESTS[1][2], 0.0)
    inbox.take_part(PEERS[2], 0, DIGESTS[2][0], 0.0)
    assert inbox.touched == {0, 2}
    inbox.touched.clear()
    inbox.take_digests(PEERS[1], DIGESTS[1], 0.0)
    assert inbox.touched == {2}, "what has not come is not complete by its digest"


def test_lost_and_silent_senders_are_given_up_and_others_waited_for(plan: Plan) -> None:
    lost = frozenset({PEERS[1]})
    deadlines = {1: 13.0, 2: 13.0, 3: 14.0}
    assert list_missing(plan, lost, deadlines, 12.9) == (
        [Missing(index=1, reason=Failure.SENDER_LOST)],
        [2, 3],
    )
    missing, pending = list_missing(plan, lost, deadlines, 13.0)
    assert [(one.index, one.reason) for one in missing] == [(1, Failure.SENDER_LOST), (2, Failure.SENDER_SLOW)]
    assert pending == [3]
    assert list_missing(plan, frozenset(PEERS), {}, 0.0) == ([], []), "what a lost sender delivered before counts"


def test_a_part_waits_for_one_peer_at_a_time() -> None:
    waits = Waits()
    for part in range(3):
        waits.file(part, PEERS[part % 2], 1.0)
    waits.file(0, PEERS[0], 2.0)
    waits.file(2, PEERS[1], 1.0)
    assert waits.entries == {(PEERS[1], 1.0): {1, 2}, (PEERS[0], 2.0): {0}}
    waits.drop(0)
    waits.drop(0)
    waits.drop(7)
    waits.drop(1)
    assert waits.entries == {(PEERS[1], 1.0): {2}}
