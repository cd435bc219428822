"""Attendance: how a member has taken part so far, as far as the weights of its swarm ask for it, and the factor by
which its claim to a weight grows or shrinks for that.

With "participation" a member that takes part in few rounds counts for the others, too, whenever it does: by the mean of
the intervals between the rounds that counted it (FedAU, arXiv 2306.03401). With "freshness" work counts the less, the
more rounds its base is behind ((1 + s)^-1/2: FedAsync, arXiv 1903.03934). With "work" nothing is asked.
protocol/README.md, "Aggregation", specifies every operation.

Invariants: where the rule does not ask for a field it is 0; a factor of participation lies in 1 .. INTERVAL_ROUNDS_MAX,
one of freshness in 0 .. 1; the intervals that an honest peer declares are never longer than those that any other one
expects of it, however little of the log that one has seen.
"""

import math
from dataclasses import dataclass

from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.wire import U63

WORK, PARTICIPATION, FRESHNESS = WEIGHTS = ("work", "participation", "freshness")
# No interval counts for more rounds (the paper's K). A longer absence is several intervals, the last one shorter.
INTERVAL_ROUNDS_MAX = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Attendance:
    """Part of a READY, and of the member in the result. `intervals` lie between rounds that counted this peer, the last
    one ends with the round of the READY, and they are `interval_rounds` long together. `base_age` is how many rounds
    with an update have been certified since the work began on its base, without a part of it."""

    intervals: U63 = 0
    interval_rounds: U63 = 0
    base_age: U63 = 0


NO_ATTENDANCE = Attendance()


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """A round that counted a peer's contribution, in some part at least, and what the peer had declared there."""

    round: int
    attendance: Attendance


def expect_attendance(last: Counted | None, number: int) -> Attendance:
    """What a peer declares of its intervals in round `number`, where `last` is the newest round before that counted it:
    nothing where there is none. Who takes an older round for the newest one expects fewer intervals that are as long
    together, and so a longer mean."""
    if last is None:
        return NO_ATTENDANCE
    assert last.round < number, "an interval ends with the open round"
    rounds = number - last.round
    return Attendance(
        intervals=last.attendance.intervals + -(-rounds // INTERVAL_ROUNDS_MAX),
        interval_rounds=last.attendance.interval_rounds + rounds,
    )


def exceeds(declared: Attendance, expected: Attendance) -> bool:
    """Whether the mean interval is longer than expected."""
    mine = declared.interval_rounds * max(expected.intervals, 1)
    return mine > max(expected.interval_rounds, 1) * max(declared.intervals, 1)


def check_attendance(declared: Attendance, rule: str, number: int) -> None:
    """Raise ProtocolError unless a READY of round `number` may declare this under the manifest's rule."""
    intervals, rounds = declared.intervals, declared.interval_rounds
    if rule != PARTICIPATION and (intervals or rounds):
        raise ProtocolError(Refusal.OUT_OF_RANGE, f"intervals are declared where weights go by {rule}")
    if rule != FRESHNESS and declared.base_age:
        raise ProtocolError(Refusal.OUT_OF_RANGE, f"the age of a base is declared where weights go by {rule}")
    if not intervals <= rounds <= INTERVAL_ROUNDS_MAX * intervals:
        detail = f"{intervals} intervals of 1 to {INTERVAL_ROUNDS_MAX} rounds are not {rounds} long together"
        raise ProtocolError(Refusal.OUT_OF_RANGE, detail)
    if rounds >= number or declared.base_age >= number:
        told = max(rounds, declared.base_age)
        raise ProtocolError(Refusal.OUT_OF_RANGE, f"{told} rounds before round {number} are declared")


def weight_factor(declared: Attendance, rule: str) -> float:
    """By how much the claim of a member counts more, or less, than its work says. What is declared has
    passed `check_attendance`."""
    if rule == PARTICIPATION and declared.intervals:
        return declared.interval_rounds / declared.intervals
    if rule == FRESHNESS:
        return 1 / math.sqrt(1 + declared.base_age)
    return 1.0
