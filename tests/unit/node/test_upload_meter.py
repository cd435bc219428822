"""Measuring how fast another peer can send: it offers bytes on its link, they are fetched, timed and thrown away."""

import asyncio

import pytest
from blake3 import blake3

from shoal.node.doctor_swarm import open_links
from shoal.node.link_port import LinkConfig
from shoal.node.links import TensorLinks
from shoal.node.upload_meter import PAUSE_S, UploadMeter
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.messages import MeasureUpload
from tests.unit.node.link_harness import ALICE, BOB, CONFIG, SWARM, RecordingSink


async def test_a_visitor_offers_and_a_member_times() -> None:
    now = [100.0]

    def clock() -> float:
        now[0] += 0.5
        return now[0]

    meter = UploadMeter(clock)
    member = TensorLinks(BOB, SWARM, LinkConfig(host=CONFIG.host), RecordingSink())
    address = await member.start()
    try:
        async with open_links(ALICE, SWARM, CONFIG.host) as (links, offer, _):
            assert await links.probe(BOB.peer, address)
            while not member.is_linked(ALICE.peer):
                await asyncio.sleep(0)
            question = MeasureUpload(digest=blake3(offer).digest(), nbytes=len(offer))
            answer = await meter.measure(member, ALICE.peer, question)
            assert answer.seconds == 0.5
            with pytest.raises(ProtocolError) as refused:
                await meter.measure(member, ALICE.peer, question)
            assert refused.value.refusal is Refusal.LIMIT
            now[0] += PAUSE_S
            with pytest.raises(ProtocolError) as missing:
                await meter.measure(member, ALICE.peer, MeasureUpload(digest=bytes(32), nbytes=10))
            assert missing.value.refusal is Refusal.EXPIRED
    finally:
        await member.stop()


async def test_who_has_no_link_is_not_dialled() -> None:
    member = TensorLinks(BOB, SWARM, CONFIG, RecordingSink())
    await member.start()
    try:
        with pytest.raises(ProtocolError) as refused:
            await UploadMeter().measure(member, ALICE.peer, MeasureUpload(digest=bytes(32), nbytes=10))
        assert refused.value.refusal is Refusal.EXPIRED
    finally:
        await member.stop()
