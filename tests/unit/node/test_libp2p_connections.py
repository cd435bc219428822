"""When a connection is asked whether its peer is still there."""

import types
from typing import Any

import pytest
import trio
import trio.testing

from shoal.node import libp2p_connections
from shoal.node.libp2p_connections import PING_PERIOD_S, SECOND_LOOK_S, SILENCE_TIMEOUT_S, BoundedYamux

STEP_S = 0.5
BUSY_S = 30.0
ANSWERED_S = 60.0


def test_only_a_peer_of_which_nothing_comes_is_pinged(monkeypatch: pytest.MonkeyPatch) -> None:
    """It sends all the time, then it answers pings only, then nothing: it is pinged from the second stretch on."""
    pinged_s: list[float] = []
    dropped_s: list[float] = []

    async def run() -> None:
        began_s = trio.current_time()

        def now_s() -> float:
            return trio.current_time() - began_s

        async def drop() -> None:
            dropped_s.append(now_s())
            yamux.event_shutting_down.set()

        transport = types.SimpleNamespace(received_bytes=0, received_s=trio.current_time(), abort=drop)

        def hear() -> None:
            transport.received_bytes += 12
            transport.received_s = trio.current_time()

        async def ping() -> None:
            pinged_s.append(now_s())
            if now_s() > ANSWERED_S:
                await trio.sleep_forever()
            hear()

        yamux: Any = BoundedYamux.__new__(BoundedYamux)
        yamux.event_shutting_down = trio.Event()
        yamux._ping = ping
        monkeypatch.setattr(libp2p_connections, "transport_of", lambda _: transport)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(yamux._measure_rtt_loop)
            while not dropped_s:
                if now_s() < BUSY_S:
                    hear()
                await trio.testing.wait_all_tasks_blocked()
                clock.jump(STEP_S)

    clock = trio.testing.MockClock()
    trio.run(run, clock=clock)
    first_s = BUSY_S - STEP_S + PING_PERIOD_S
    assert pinged_s == pytest.approx([first_s + PING_PERIOD_S * k for k in range(len(pinged_s))])
    assert pinged_s[-2] <= ANSWERED_S < pinged_s[-1]
    assert dropped_s == pytest.approx([pinged_s[-1] + SILENCE_TIMEOUT_S + SECOND_LOOK_S])
