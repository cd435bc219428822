"""A clock that stands while the process does, and what of a round's time counts for a process that was stopped."""

import asyncio
from pathlib import Path

import pytest

from shoal.node.run_clock import PULSE_S, STOPPED_S, RunClock
from shoal.protocol.effects import Effect
from tests.unit.node.node_samples import make_samples, open_peer

REROOT_AFTER_S = 20.0


class Time:
    """Of a process that runs or is stopped as the test says."""

    def __init__(self, now_s: float = 100.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


def test_time_in_which_nobody_looked_is_none() -> None:
    time = Time()
    clock = RunClock(time)
    for _ in range(7):
        time.now_s += PULSE_S
        clock.now()
    assert clock.now() == 107.0
    time.now_s += 3600.0
    assert (clock.now(), clock.now()) == (107.0, 107.0)
    assert clock.find(110.0) == 3710.0
    time.now_s = 3710.0
    assert clock.now() == 110.0


def test_a_loop_that_is_held_up_for_a_while_has_run() -> None:
    time = Time()
    clock = RunClock(time)
    time.now_s += STOPPED_S
    assert clock.now() == 100.0 + STOPPED_S


async def test_the_declared_timer_does_not_run_while_the_process_is_stopped(tmp_path: Path) -> None:
    swarm = make_samples(founders=2, reroot_after_s=REROOT_AFTER_S)
    async with open_peer(swarm, 0, tmp_path) as peer:
        peer.core._saw_quorum = True  # the other founder was there, and is gone for good
        time = Time(asyncio.get_running_loop().time())
        peer.driver.clock = RunClock(time)

        def go_on(span_s: float) -> list[Effect]:
            time.now_s += span_s
            peer.core.handle_deadline(peer.driver.now())
            return peer.core.take_effects()

        go_on(PULSE_S)
        stopped = [go_on(10.0 * REROOT_AFTER_S) for _ in range(3)]  # each time it goes on for a moment
        assert stopped == [[], [], []], "nothing is declared"
        ran = [bool(go_on(PULSE_S)) for _ in range(int(REROOT_AFTER_S / PULSE_S))]
        assert not any(ran[:-2]) and any(ran[-2:]), "it has waited for all of the time by then"


async def test_a_limit_is_waited_for_after_a_stop_as_long_as_before(tmp_path: Path) -> None:
    async with open_peer(make_samples(founders=2, reroot_after_s=REROOT_AFTER_S), 0, tmp_path) as peer:
        time = Time(asyncio.get_running_loop().time())
        peer.driver.clock = RunClock(time)
        time.now_s += 1000.0
        peer.driver.now()
        peer.driver.pump()
        due_s, timer = peer.core.next_deadline(), peer.driver._timer
        assert due_s is not None and timer is not None
        assert timer.when() - due_s == pytest.approx(1000.0)
