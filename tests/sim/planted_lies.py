"""Planted bugs: what is believed of members that may lie."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from blake3 import blake3

from shoal.protocol import aggregators, attendance, proposer
from shoal.protocol.round_ballot import RoundBallot
from shoal.protocol.round_state import RoundState
from tests.sim import training
from tests.sim.peer import SimPeer
from tests.sim.planted import Arena, Patches, bug


@bug(arena=Arena.LIARS, seed=3, by="result = aggregate of the bitmap's members")
def received_bytes_unchecked(patches: Patches) -> None:
    """Bytes that decode are taken for those of the digest under which they were asked for or announced."""

    def check(old: Any, self: SimPeer, codec: str, number: int, part: int, raw: bytes, digest: bytes) -> None:
        old(self, codec, number, part, raw, blake3(raw).digest())

    patches.wrap(SimPeer, "_check_bytes", check)


@bug(arena=Arena.LIARS, seed=7, by="no honest peer is accused")
def evidence_unchecked(patches: Patches) -> None:
    """Where members may lie, a proposer's result is believed without the owners' words."""
    patches.everywhere(proposer.check_evidence, lambda *args: None)


@bug(seed=4, by="weights as planned")
def weights_uncapped(patches: Patches) -> None:
    """A member weighs as much as it claims."""

    def weigh(tokens: Iterable[int], steps: Iterable[int], factors: Iterable[float]) -> Any:
        claims = [max(int(t), 1) ** 2 / max(int(s), 1) for t, s in zip(tokens, steps, strict=True)]
        return np.array([max(claim / sum(claims), 1e-6) for claim in claims], np.float32)

    patches.everywhere(aggregators.planned_weights, weigh)


@bug(seed=5, by="attendance as the log says")
def rounds_not_remembered(patches: Patches) -> None:
    """Where weights go by participation, every round is a peer's first."""
    patches.everywhere(attendance.expect_attendance, lambda last, number: attendance.NO_ATTENDANCE)
    patches.set(training, "expect_attendance", lambda last, number: attendance.NO_ATTENDANCE)


@bug(seed=5, by="weights as planned")
def attendance_not_weighed(patches: Patches) -> None:
    """What members declare besides their work makes no difference."""
    patches.everywhere(attendance.weight_factor, lambda declared, rule: 1.0)


@bug(arena=Arena.LIARS, seed=8, by="no honest peer is accused")
def votes_without_locks(patches: Patches) -> None:
    """Where members may lie, voters vote at once, as if nobody did."""
    patches.set(RoundState, "_needs_locks", lambda self: False)


@bug(seed=1131779170, by="rounds commit after faults stop")
def followed_anywhere(patches: Patches) -> None:
    """Where members may lie, one voter's word leads another to any attempt of its own."""
    patches.set(RoundBallot, "_may_follow", lambda self, attempt: True)
