"""What the doctor's visitor makes of a member that measures its upload, or does not."""

from typing import Any
from unittest.mock import AsyncMock

import pytest

from shoal.node import doctor_swarm
from shoal.node.control import RequestRefused
from shoal.node.doctor_swarm import SwarmView, SwarmVisit
from shoal.protocol.errors import Refusal
from shoal.protocol.messages import UploadAnswer, encode_message
from tests.unit.node.link_harness import ALICE, BOB, SWARM

OFFER = memoryview(bytes(1000))
ANSWER = encode_message(SWARM, UploadAnswer(seconds=0.5))


@pytest.mark.parametrize(
    ("said", "fault", "asked"),
    [
        ([ANSWER], "", 1),
        ([RequestRefused(BOB.peer, Refusal.LIMIT), ANSWER], "", 2),
        ([RequestRefused(BOB.peer, Refusal.LIMIT)] * 2, "refused: limit", 2),
        ([RequestRefused(BOB.peer, Refusal.EXPIRED)], "refused: expired", 1),
        ([b"rubbish"], "malformed", 1),
    ],
    ids=["measured", "busy at first", "busy", "refused", "nonsense"],
)
async def test_a_member_that_has_just_measured_is_asked_once_more(
    monkeypatch: pytest.MonkeyPatch, said: list[Any], fault: str, asked: int
) -> None:
    monkeypatch.setattr(doctor_swarm, "UPLOAD_PAUSE_S", 0.0)
    control, view = AsyncMock(), SwarmView()
    control.request.side_effect = said
    told = await SwarmVisit(ALICE, SWARM, control, view)._measure_up(BOB.peer, OFFER)
    assert fault in told and bool(told) == bool(fault)
    assert view.up_bytes_per_s == (None if fault else 2000.0)
    assert control.request.await_count == asked
