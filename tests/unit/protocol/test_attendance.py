"""What members declare besides their work, and what it makes of their weights."""

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from shoal.protocol.aggregators import planned_weights
from shoal.protocol.attendance import (
    FRESHNESS,
    INTERVAL_ROUNDS_MAX,
    NO_ATTENDANCE,
    PARTICIPATION,
    WEIGHTS,
    WORK,
    Attendance,
    Counted,
    check_attendance,
    exceeds,
    expect_attendance,
    weight_factor,
)
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.messages import Member
from shoal.protocol.quorum import list_counted, make_bitmap
from shoal.protocol.wire import decode_record_untrusted, encode_record
from tests.unit.protocol.samples import PEERS, make_head, make_sample_result


def declare(present: Sequence[bool]) -> list[Attendance]:
    """What a peer declares in each round that counts it, one after the other, from the one before alone."""
    last, declared = None, []
    for number, is_counted in enumerate(present, start=1):
        if is_counted:
            said = expect_attendance(last, number)
            last = Counted(round=number, attendance=said)
            declared.append(said)
    return declared


def average_intervals(present: Sequence[bool], cutoff: int) -> list[float]:
    """FedAU's weights round by round (arXiv 2306.03401): of the rounds that count the peer, from its first one on."""
    weight, intervals, since, weights = 1.0, 0, 0, []
    for is_counted in present[present.index(True) + 1 :]:
        since += 1
        if is_counted or since == cutoff:
            weight = float(since) if intervals == 0 else (intervals * weight + since) / (intervals + 1)
            intervals, since = intervals + 1, 0
        if is_counted:
            weights.append(weight)
    return weights


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.005, 0.02, 0.1, 0.5, 1.0])
def test_the_factor_is_the_mean_interval_of_fedau(share: float, seed: int) -> None:
    entropy = random.Random(seed)
    present = [entropy.random() < share for _ in range(900)]
    present[entropy.randrange(100)] = True
    factors = [weight_factor(one, PARTICIPATION) for one in declare(present)]
    assert factors[0] == 1.0, "who was never counted has no interval"
    assert factors[1:] == pytest.approx(average_intervals(present, INTERVAL_ROUNDS_MAX), rel=1e-12)


@pytest.mark.parametrize(
    ("rounds", "intervals"), [(1, 1), (49, 1), (50, 1), (51, 2), (100, 2), (101, 3), (150, 3), (1000, 20)]
)
def test_a_long_absence_is_several_intervals(rounds: int, intervals: int) -> None:
    last = Counted(round=7, attendance=Attendance(intervals=3, interval_rounds=9))
    expected = Attendance(intervals=3 + intervals, interval_rounds=9 + rounds)
    assert expect_attendance(last, 7 + rounds) == expected


def test_factors_are_these_numbers() -> None:
    said = Attendance(intervals=3, interval_rounds=10)
    assert weight_factor(said, PARTICIPATION).hex() == (10 / 3).hex() == "0x1.aaaaaaaaaaaabp+1"
    assert [weight_factor(said, rule) for rule in (WORK, FRESHNESS)] == [1.0, 1.0]
    ages = [weight_factor(Attendance(base_age=age), FRESHNESS) for age in (0, 1, 2, 3, 8, 2**40)]
    assert [one.hex() for one in ages[:3]] == ["0x1.0000000000000p+0", "0x1.6a09e667f3bccp-1", "0x1.279a74590331dp-1"]
    assert ages[3:] == [0.5, 1 / 3, (1 + 2**40) ** -0.5]
    assert [weight_factor(Attendance(base_age=9), rule) for rule in (WORK, PARTICIPATION)] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("declared", "rule", "number"),
    [
        (Attendance(intervals=1, interval_rounds=1), WORK, 9),
        (Attendance(intervals=1, interval_rounds=1), FRESHNESS, 9),
        (Attendance(base_age=1), WORK, 9),
        (Attendance(base_age=1), PARTICIPATION, 9),
        (Attendance(intervals=3, interval_rounds=2), PARTICIPATION, 9),
        (Attendance(intervals=0, interval_rounds=2), PARTICIPATION, 9),
        (Attendance(intervals=1, interval_rounds=51), PARTICIPATION, 90),
        (Attendance(intervals=2, interval_rounds=9), PARTICIPATION, 9),
        (Attendance(base_age=9), FRESHNESS, 9),
    ],
)
def test_what_no_peer_can_have_done_is_refused(declared: Attendance, rule: str, number: int) -> None:
    with pytest.raises(ProtocolError) as caught:
        check_attendance(declared, rule, number)
    assert caught.value.refusal is Refusal.OUT_OF_RANGE


@pytest.mark.parametrize(
    ("declared", "rule", "number"),
    [
        *((NO_ATTENDANCE, rule, 1) for rule in WEIGHTS),
        (Attendance(intervals=2, interval_rounds=8), PARTICIPATION, 9),
        (Attendance(intervals=8, interval_rounds=8), PARTICIPATION, 9),
        (Attendance(intervals=1, interval_rounds=50), PARTICIPATION, 51),
        (Attendance(base_age=8), FRESHNESS, 9),
    ],
)
def test_what_a_peer_can_have_done_is_not_refused(declared: Attendance, rule: str, number: int) -> None:
    check_attendance(declared, rule, number)
    assert weight_factor(declared, rule) > 0


def test_longer_intervals_than_expected_are_noticed_and_shorter_ones_are_not() -> None:
    expected = Attendance(intervals=4, interval_rounds=10)
    said = [Attendance(intervals=2, interval_rounds=rounds) for rounds in (2, 4, 5, 6, 50)]
    assert [exceeds(one, expected) for one in said] == [False, False, False, True, True]
    assert not exceeds(NO_ATTENDANCE, expected), "who has forgotten its rounds counts as new"
    assert exceeds(Attendance(intervals=1, interval_rounds=2), NO_ATTENDANCE)


def test_weights_are_claims_times_factors_under_the_old_caps() -> None:
    # Claims 100, 300 and 200: the cap of two medians is not reached.
    weights = planned_weights([100, 100, 100], [100, 100, 100], [1.0, 3.0, 2.0])
    assert weights.tolist() == [np.float32(1 / 6), np.float32(1 / 2), np.float32(1 / 3)]
    # 50 of the others: the cap leaves two.
    weights = planned_weights([100] * 3, [100] * 3, [1.0, 1.0, 50.0])
    assert weights.tolist() == [0.25, 0.25, 0.5]
    # And among many, two sixths would be more than a quarter.
    weights = planned_weights([100] * 4, [100] * 4, [1.0, 1.0, 1.0, 50.0])
    assert weights.tolist() == [0.25] * 4


def test_a_factor_of_one_changes_no_bit() -> None:
    tokens, steps = [51_200, 204_800, 12_345, 999_999, 7, 80_000], [100, 130, 64, 300, 1, 90]
    assert planned_weights(tokens, steps, [1.0] * 6).tobytes() == planned_weights(tokens, steps).tobytes()


def test_attendance_takes_no_byte_where_there_is_none() -> None:
    plain = Member(peer=PEERS[0], contribution_root=bytes(32), tokens=1, steps=1, weight=0.5)
    short = encode_record(plain)
    assert short[0] == 0x95, "an array of five fields, as before there were more"
    assert decode_record_untrusted(Member, short) == plain
    said = Member(
        peer=PEERS[0],
        contribution_root=bytes(32),
        tokens=1,
        steps=1,
        weight=0.5,
        attendance=Attendance(intervals=2, interval_rounds=3, base_age=0),
    )
    assert encode_record(said) == b"\x96" + short[1:] + b"\x93\x02\x03\x00"
    assert decode_record_untrusted(Member, encode_record(said)) == said
    with pytest.raises(ProtocolError) as caught:
        decode_record_untrusted(Member, b"\x96" + short[1:] + b"\x93\x00\x00\x00")
    assert caught.value.refusal is Refusal.NON_CANONICAL, "one value, one encoding"


def test_a_round_counts_those_of_whom_any_part_is_in_it() -> None:
    result = make_sample_result(make_head(), members=3)
    bitmaps = [make_bitmap(frozenset(members), 3) for members in ({0}, {0, 2})]
    parts = tuple(replace(part, contributors=bitmaps[at % 2]) for at, part in enumerate(result.parts))
    said = Attendance(intervals=1, interval_rounds=1)
    members = (*result.members[:2], replace(result.members[2], attendance=said))
    counted = list_counted(replace(result, parts=parts, members=members))
    assert counted == {
        members[0].peer: Counted(round=result.round, attendance=NO_ATTENDANCE),
        members[2].peer: Counted(round=result.round, attendance=said),
    }
