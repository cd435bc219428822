"""What the tests of catch-up share: a newcomer and its donors over real tensor links, some of them not honest."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shoal.node import fetch
from shoal.protocol.errors import Refusal
from shoal.protocol.identity import PeerId
from shoal.protocol.messages import (
    Certificate,
    decode_message_untrusted,
    encode_message,
)
from tests.unit.node.node_samples import (
    TINY_ELEMENTS,
    Chain,
    Peer,
    Swarm,
    fill_folder,
    make_chain,
    make_samples,
    open_peer,
)

NEWCOMER = 7  # no voter
SNAPSHOT = 25
FAR = 27  # replay from 0 takes more bytes than a snapshot
LONG = 24
CHUNKS = 6
HOPE_S = 0.3

Change = Callable[[object], object]


@pytest.fixture(autouse=True)
def short_hope(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "HOPE_S", HOPE_S)


@asynccontextmanager
async def open_swarm(
    folder: Path, rounds: int, *, donors: int = 2, elements: int = TINY_ELEMENTS, **rules: object
) -> AsyncIterator[tuple[Peer, list[Peer], Chain]]:
    """A newcomer at round 0 that knows `donors` peers at the end of a chain; those at FAR have a snapshot. `rules` are
    other values than the samples'."""
    swarm = make_samples(elements, **rules)
    chain = make_chain(swarm, rounds, (SNAPSHOT,) if rounds == FAR else ())
    async with AsyncExitStack() as stack:
        filled = []
        for number in range(donors):
            fill_folder(swarm, folder / str(number), chain)
            filled.append(await stack.enter_async_context(open_peer(swarm, number, folder)))
        newcomer = await stack.enter_async_context(open_newcomer(swarm, folder, filled))
        yield newcomer, filled, chain


@asynccontextmanager
async def open_newcomer(swarm: Swarm, folder: Path, donors: list[Peer], number: int = NEWCOMER) -> AsyncIterator[Peer]:
    """A peer that is connected to the donors and has heard them."""
    async with open_peer(swarm, number, folder) as newcomer:
        for donor in donors:
            await newcomer.connect(donor)
            newcomer.meet(donor)
        yield newcomer


def keep_updates(chain: Chain, certificates: Sequence[Certificate]) -> Chain:
    """With the updates of these rounds alone."""
    digests = {part.digest for one in certificates for part in one.result.parts}
    return replace(chain, blobs={digest: raw for digest, raw in chain.blobs.items() if digest in digests})


def rewrite_answers(donor: Peer, change: Change) -> None:
    """Let `change` replace what this donor answers."""
    honest = donor.answer

    async def answer(peer: PeerId, raw: bytes) -> bytes:
        message = decode_message_untrusted(donor.swarm.id, await honest(peer, raw))
        return encode_message(donor.swarm.id, change(message))

    donor.answer = answer


def serve_instead(donor: Peer, change: Callable[[memoryview], memoryview | None]) -> None:
    """Let `change` replace the blobs and chunks that this donor serves."""
    honest = donor.exchange.serve

    async def serve(peer: PeerId, digest: bytes) -> memoryview | Refusal | None:
        found = await honest(peer, digest)
        assert isinstance(found, memoryview)
        return change(found)

    donor.exchange.serve = serve  # type: ignore[method-assign]


def wait_for_all(donors: list[Peer]) -> None:
    """Let nobody serve anything before everybody was asked for something."""
    asked, everybody = set[PeerId](), asyncio.Event()

    def hold_back(donor: Peer) -> None:
        honest = donor.exchange.serve

        async def serve(peer: PeerId, digest: bytes) -> memoryview | Refusal | None:
            asked.add(donor.me)
            if len(asked) == len(donors):
                everybody.set()
            await everybody.wait()
            return await honest(peer, digest)

        donor.exchange.serve = serve  # type: ignore[method-assign]

    for donor in donors:
        hold_back(donor)


def corrupt(raw: memoryview) -> memoryview:
    return memoryview(bytes([raw[0] ^ 1]) + bytes(raw[1:]))


def assert_same_state(newcomer: Peer, donor: Peer) -> None:
    """All that makes two replicas one state, and that the round core goes on from there."""
    assert newcomer.state.head == donor.state.head == newcomer.core.head
    assert newcomer.state.replica.root() == donor.state.replica.root() == donor.state.head.state_root
    assert np.array_equal(newcomer.params, donor.params)
    assert not newcomer.catch_up.active and newcomer.catch_up.detail == ""


def assert_untouched(newcomer: Peer, chain: Chain) -> None:
    """Nothing of what the donors said was believed, and the next attempt is free to begin."""
    assert newcomer.state.head == chain.heads[0] == newcomer.core.head
    assert newcomer.state.replica.root() == chain.heads[0].state_root
    assert newcomer.state.load_certificates(1, FAR) == ()
    assert not newcomer.catch_up.active
