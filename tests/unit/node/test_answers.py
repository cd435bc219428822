"""What this peer answers: bounded, from what it holds, and nothing to a question that is none."""

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest

from shoal.node import answers, dial_back
from shoal.node.endpoints import format_endpoint
from shoal.node.link_port import LinkConfig
from shoal.protocol.errors import ProtocolError, Refusal
from shoal.protocol.messages import (
    CERTIFICATES_PER_ANSWER,
    CertificatesAnswer,
    GetCertificates,
    GetManifest,
    GetObserved,
    GetPeers,
    GetSnapshot,
    ManifestAnswer,
    ObservedAnswer,
    PeersAnswer,
    Prepare,
    ProbeAddresses,
    ProbeAnswer,
    SnapshotAnswer,
    decode_message_untrusted,
    encode_message,
)
from shoal.protocol.state import decode_index_untrusted
from shoal.protocol.wire import encode_record
from tests.unit.node.node_samples import (
    Chain,
    Peer,
    fill_folder,
    make_chain,
    make_samples,
    open_peer,
    open_peers,
    wait_until,
)
from tests.unit.node.puppet import open_puppet
from tests.unit.protocol.samples import PEERS

A = TypeVar("A")
ROUNDS = CERTIFICATES_PER_ANSWER + 3
SNAPSHOT = 16
ASKER = 5


@asynccontextmanager
async def open_donor(folder: Path) -> AsyncIterator[tuple[Peer, Chain]]:
    """A peer that stands at ROUNDS and has a snapshot of round SNAPSHOT."""
    swarm = make_samples(snapshot_every=64)
    chain = make_chain(swarm, ROUNDS, (SNAPSHOT,))
    fill_folder(swarm, folder / "0", chain)
    async with open_peer(swarm, 0, folder) as peer:
        assert peer.core.head.round == ROUNDS
        yield peer, chain


async def ask(peer: Peer, question: object, kind: type[A]) -> A:
    raw = await peer.answers.answer(PEERS[ASKER], encode_message(peer.swarm.id, question))
    answer = decode_message_untrusted(peer.swarm.id, raw)
    assert isinstance(answer, kind)
    return answer


async def test_the_manifest_is_given_as_it_was_signed(tmp_path: Path) -> None:
    async with open_donor(tmp_path) as (peer, _):
        assert (await ask(peer, GetManifest(), ManifestAnswer)).signed_manifest == peer.swarm.signed


@pytest.mark.parametrize(
    ("first", "count", "rounds"),
    [
        (1, 3, range(1, 4)),
        (1, CERTIFICATES_PER_ANSWER, range(1, CERTIFICATES_PER_ANSWER + 1)),
        (ROUNDS - 1, 5, range(ROUNDS - 1, ROUNDS + 1)),
        (ROUNDS + 1, 5, range(0)),
    ],
)
async def test_certificates_come_in_a_row_and_only_those_that_are_here(
    tmp_path: Path, first: int, count: int, rounds: range
) -> None:
    async with open_donor(tmp_path) as (peer, chain):
        answer = await ask(peer, GetCertificates(first_round=first, count=count), CertificatesAnswer)
        assert answer.certificates == tuple(chain.certificates[number - 1] for number in rounds)


async def test_an_answer_stays_below_its_limit_however_many_certificates_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_donor(tmp_path) as (peer, chain):
        sizes = [len(encode_record(one)) for one in chain.certificates]
        monkeypatch.setattr(answers, "ANSWER_BYTES_MAX", sum(sizes[:2]) + sizes[2] // 2)
        answer = await ask(peer, GetCertificates(first_round=1, count=CERTIFICATES_PER_ANSWER), CertificatesAnswer)
        assert answer.certificates == chain.certificates[:2]


@pytest.mark.parametrize(("round_max", "found"), [(SNAPSHOT - 1, False), (SNAPSHOT, True), (ROUNDS + 9, True)])
async def test_the_newest_snapshot_that_is_wanted_is_offered(tmp_path: Path, round_max: int, found: bool) -> None:
    async with open_donor(tmp_path) as (peer, chain):
        answer = await ask(peer, GetSnapshot(round_max=round_max), SnapshotAnswer)
        if found:
            assert decode_index_untrusted(answer.index) == chain.index(SNAPSHOT)
        else:
            assert answer.index == b""


async def test_peers_are_this_one_and_those_that_live(tmp_path: Path) -> None:
    async with open_peers(tmp_path, 3) as (ann, bob, cara):
        answer = await ask(ann, GetPeers(), PeersAnswer)
        assert answer.presences[0].peer == ann.me
        assert {one.peer for one in answer.presences} == {ann.me, bob.me, cara.me}


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dial_back, "PERIOD_S", 1e-6)


@asynccontextmanager
async def open_member(folder: Path) -> AsyncIterator[tuple[Peer, str]]:
    """A peer that is asked, and the address of the member who asks."""
    swarm = make_samples()
    async with open_peer(swarm, 0, folder) as peer, open_puppet(swarm, ASKER, peer) as puppet:
        puppet.show(peer)
        yield peer, format_endpoint(swarm.addresses[puppet.me])


async def test_reachability_is_tried_and_not_guessed(tmp_path: Path, no_pause: None) -> None:
    async with open_member(tmp_path) as (peer, address):
        question = ProbeAddresses(addresses=(address, "127.0.0.1:1", "nothing to dial"))
        for _ in range(2):
            assert await ask(peer, question, ProbeAnswer) == ProbeAnswer(reached=(True, False, None))
            # A second link has told what it was made for, and goes.
            await wait_until(lambda: peer.links.statistics().links == 1)


async def test_an_address_of_a_family_that_this_peer_has_no_way_to_is_not_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_member(tmp_path) as (peer, _):

        async def unreachable(*args: object, **options: object) -> None:
            raise OSError(errno.ENETUNREACH, "no route")

        monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", unreachable)
        answer = await ask(peer, ProbeAddresses(addresses=("[2001:db8::1]:1",)), ProbeAnswer)
        assert answer == ProbeAnswer(reached=(None,))


async def test_a_peer_without_room_for_a_link_says_that_it_does_not_know(tmp_path: Path) -> None:
    async with open_member(tmp_path) as (peer, address):
        config: LinkConfig = peer.links.config
        peer.links.config = replace(config, links_max=0)
        assert await ask(peer, ProbeAddresses(addresses=(address,)), ProbeAnswer) == ProbeAnswer(reached=(None,))
        peer.links.config = config


async def test_dial_backs_are_for_members_and_one_at_a_time(tmp_path: Path) -> None:
    async with open_member(tmp_path) as (peer, address):
        question = ProbeAddresses(addresses=(address,))
        both = await asyncio.gather(
            ask(peer, question, ProbeAnswer), ask(peer, question, ProbeAnswer), return_exceptions=True
        )
        assert both[0] == ProbeAnswer(reached=(True,))
        assert isinstance(both[1], ProtocolError) and both[1].refusal is Refusal.LIMIT
        with pytest.raises(ProtocolError) as caught:
            await peer.paths.answer(PEERS[ASKER + 1], question)
        assert caught.value.refusal is Refusal.NOT_A_MEMBER


async def test_a_peer_is_told_how_its_link_is_seen(tmp_path: Path) -> None:
    swarm = make_samples()
    async with open_peer(swarm, 0, tmp_path) as peer, open_puppet(swarm, ASKER, peer) as puppet:
        binding = await puppet.links.dial_from_port(peer.me, swarm.addresses[peer.me])
        await wait_until(lambda: peer.links.is_linked(puppet.me))
        seen = await ask(peer, GetObserved(binding=binding), ObservedAnswer)
        assert seen.address == format_endpoint(swarm.addresses[puppet.me])
        assert await ask(peer, GetObserved(binding=bytes(32)), ObservedAnswer) == ObservedAnswer(address="")


@pytest.mark.parametrize(
    ("raw", "refusal"),
    [
        (lambda swarm: encode_message(swarm, Prepare(round=1, attempt=1)), Refusal.UNKNOWN_TYPE),
        (lambda swarm: encode_message(swarm, PeersAnswer(presences=())), Refusal.UNKNOWN_TYPE),
        (lambda swarm: encode_message(b"o" * 32, GetPeers()), Refusal.WRONG_SWARM),
        (lambda swarm: encode_message(swarm, GetPeers())[:-1], Refusal.MALFORMED),
    ],
    ids=["message", "answer", "other swarm", "truncated"],
)
async def test_what_is_no_question_gets_no_answer(tmp_path: Path, raw: object, refusal: Refusal) -> None:
    assert callable(raw)
    async with open_peer(make_samples(), 0, tmp_path) as peer:
        with pytest.raises(ProtocolError) as caught:
            await peer.answers.answer(peer.me, raw(peer.swarm.id))
        assert caught.value.refusal is refusal


async def test_a_snapshot_that_is_offered_is_lent(tmp_path: Path) -> None:
    async with open_donor(tmp_path) as (peer, _):
        store = peer.state.stores.snapshots
        await ask(peer, GetSnapshot(round_max=SNAPSHOT), SnapshotAnswer)
        await peer.state.write_snapshot()
        assert store.rounds() == [SNAPSHOT, ROUNDS] and store.lent() == [SNAPSHOT], "it is not the newest any more"
