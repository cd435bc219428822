"""The control plane's byte counts: what is sent and what comes back as answers, and nothing twice."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from shoal.node.control import ControlConfig, ControlHandlers, PeerUnreachable, RequestRefused
from shoal.node.metered_control import MeteredControl
from shoal.node.metrics import Direction
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.identity import PeerId
from tests.sim.memory_control import MemoryControl, MemoryNetwork
from tests.unit.node.node_samples import wait_until
from tests.unit.protocol.samples import IDENTITIES

KEY = bytes(32)


class Side:
    """One metered plane and what its handlers heard."""

    def __init__(self, network: MemoryNetwork, number: int) -> None:
        self.me = IDENTITIES[number].peer
        self.heard: list[bytes] = []
        self.answer: bytes | Refusal = b"answer"
        self.lost: list[PeerId] = []
        config = ControlConfig(identity=IDENTITIES[number], swarm=KEY, listen=("/ip4/127.0.0.1/tcp/0",))
        handlers = ControlHandlers(
            on_message=lambda peer, payload: self.heard.append(payload),
            on_request=self._answer,
            on_presence=lambda peer, payload: self.heard.append(payload),
            on_peer_connected=lambda peer: None,
            on_peer_lost=self.lost.append,
        )
        self.control = MeteredControl(MemoryControl(network, config, handlers))

    async def _answer(self, peer: PeerId, payload: bytes) -> bytes:
        if isinstance(self.answer, Refusal):
            raise ProtocolError(self.answer, "by the test")
        return self.answer

    @property
    def counts(self) -> tuple[int, int]:
        return self.control.bytes[Direction.SENT], self.control.bytes[Direction.RECEIVED]


@asynccontextmanager
async def open_pair() -> AsyncIterator[tuple[Side, Side]]:
    network = MemoryNetwork()
    async with AsyncExitStack() as stack:
        sides = Side(network, 0), Side(network, 1)
        for side in sides:
            await side.control.start()
            stack.push_async_callback(side.control.stop)
        yield sides


async def test_messages_presences_and_questions_are_counted_as_sent_and_answers_as_received() -> None:
    async with open_pair() as (ann, bob):
        assert await ann.control.connect(bob.control.addresses()) == bob.me
        assert [one.peer for one in ann.control.peers()] == [bob.me]
        assert ann.counts == (0, 0), "what the library itself says is not ours"
        await ann.control.send(bob.me, b"12345")
        assert ann.counts == (5, 0)
        await ann.control.publish(b"123")
        assert ann.counts == (8, 0)
        assert await ann.control.request(bob.me, b"1234567") == b"answer"
        assert ann.counts == (15, 6)
        await wait_until(lambda: bob.heard == [b"12345", b"123"])
        assert bob.counts == (0, 0), "who receives adds to the counts itself"


async def test_a_refused_question_has_no_answer_to_count() -> None:
    async with open_pair() as (ann, bob):
        await ann.control.connect(bob.control.addresses())
        bob.answer = Refusal.NOT_READY
        with pytest.raises(RequestRefused):
            await ann.control.request(bob.me, b"12")
        assert ann.counts == (2, 0)


async def test_who_is_not_there_costs_what_was_tried() -> None:
    async with open_pair() as (ann, bob):
        with pytest.raises(PeerUnreachable):
            await ann.control.send(bob.me, b"123")
        assert ann.counts == (3, 0)


async def test_everything_else_is_passed_through() -> None:
    async with open_pair() as (ann, bob):
        await ann.control.connect(bob.control.addresses())
        assert await bob.control.provide(KEY)
        assert [one.peer for one in await ann.control.find_providers(KEY)] == [bob.me]
        found = await ann.control.find_peer(bob.me)
        assert found is not None and found.addresses == bob.control.addresses()
        await ann.control.disconnect(bob.me)
        await wait_until(lambda: ann.lost == [bob.me] and bob.lost == [ann.me])
        assert ann.counts == bob.counts == (0, 0)
