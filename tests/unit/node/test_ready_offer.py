"""Who may own parts, and a READY that follows what is true."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from shoal.node.ready_offer import ReadyOffer, may_own
from shoal.node.training.messages import Ready as TrainerReady
from shoal.protocol.attendance import NO_ATTENDANCE, Attendance
from shoal.protocol.effects import Phase
from shoal.protocol.messages import Presence
from tests.unit.node.node_samples import make_samples, open_peer


async def test_everybody_owns_where_nobody_who_trains_can_be_dialled(tmp_path: Path) -> None:
    async with open_peer(make_samples(), 0, tmp_path, trains=True) as peer:
        told = peer.presence.describe()
    hidden, open_one = replace(told, tensor_addresses=()), replace(told, tensor_addresses=("45.0.0.2:9461",))
    assert may_own(True, [open_one]) and may_own(False, []) and may_own(False, [hidden])
    assert not may_own(False, [hidden, open_one]), "parts go where they can be sent directly"
    assert may_own(False, [hidden, replace(open_one, trains=False)]), "a bootstrap peer owns nothing"
    assert may_own(False, [replace(open_one, leaving=True)])


async def test_a_ready_says_what_was_made_and_what_was_declared(tmp_path: Path) -> None:
    for number, declared in enumerate((NO_ATTENDANCE, Attendance(intervals=1, interval_rounds=1))):
        async with open_peer(make_samples(), number, tmp_path, trains=True) as peer:
            offer = ReadyOffer(
                presence=peer.presence,
                exchange=peer.exchange,
                reached=lambda: True,
                others=tuple,
                announce=lambda: None,
                pump=lambda: None,
            )
            frozen = await peer.state.freeze(peer.params - np.float32(0.5))
            made = TrainerReady(round=1, steps=0, tokens=70, loss_mean=1.0, batches_done=1)
            offer.make(frozen, made, declared)
            assert peer.presence.ready is not None
            ready = peer.presence.ready.ready
            assert (ready.tokens, ready.steps, ready.attendance) == (70, 1, declared)
            assert ready.contribution_root == frozen.root and peer.exchange.frozen is frozen


async def test_a_ready_that_is_not_true_any_more_is_said_anew_until_a_plan_uses_it(tmp_path: Path) -> None:
    others: list[Presence] = []
    announced: list[bool] = []
    async with open_peer(make_samples(), 0, tmp_path, trains=True) as peer:
        other = replace(peer.presence.describe(), tensor_addresses=("45.0.0.2:9461",))
        offer = ReadyOffer(
            presence=peer.presence,
            exchange=peer.exchange,
            reached=lambda: False,
            others=lambda: others,
            announce=lambda: announced.append(peer.presence.ready is not None and peer.presence.ready.ready.owns),
            pump=lambda: None,
        )
        offer.correct()
        assert not announced, "there is none yet"
        await peer.contribute(1)
        before = peer.presence.ready
        assert before is not None and before.ready.owns and peer.core.phase is Phase.GATHER
        offer.correct()
        assert not announced, "it is true"
        others.append(other)
        offer.correct()
        others.clear()
        offer.correct()
        assert announced == [False, True]
        assert peer.presence.ready == before
        others.append(other)
        peer.presence.leaving = True
        offer.correct()
        assert announced == [False, True], "who leaves is ready for nothing"
